"""Weights that an evaluation computes once, and never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import memfold
from memfold.compression import compression_of
from memfold.compression.kept_weights import KeptWeights

STRATEGIES = ["mag", "low_rank", "supermask"]


def make(strategy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    memfold.compress(model, strategy, ratio=0.5)
    return model.eval()


@pytest.fixture
def computed(monkeypatch):
    """Numbers of the weights that were computed for an evaluation."""
    found = []
    weight = KeptWeights.weight

    def watched(kept, index, parts, compute):
        def noted():
            found.append(index)
            return compute()

        return weight(kept, index, parts, noted)

    monkeypatch.setattr(KeptWeights, "weight", watched)
    return found


def evaluate(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8))


def expected_of(model):
    with torch.no_grad():
        dense = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
        for index, weight in enumerate((dense[0].weight, dense[2].weight)):
            weight.copy_(compression_of(model).weight(index))
        dense[0].bias.copy_(model[0].bias)
        dense[2].bias.copy_(model[2].bias)
    return evaluate(dense)


def change_data(model):
    for part in compression_of(model).part_tensors():
        part.data.neg_()


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    model.eval()


def load(model):
    change_data(other := copy.deepcopy(model))
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("change", [change_data, step, load])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_is_computed_once_until_its_parts_change(strategy, change, computed):
    model = make(strategy)
    for _ in range(2):
        torch.testing.assert_close(evaluate(model), expected_of(model))
        assert computed == [0, 1]
        evaluate(model)
        assert computed == [0, 1]
        change(model)
        computed.clear()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_none_and_shares_none(how, computed):
    model = make("mag")
    evaluate(model)
    other = how(model)
    computed.clear()
    assert torch.equal(evaluate(other), evaluate(model))
    assert computed == [0, 1]  # the copy's


def test_positions_that_move_are_seen():
    model = make("mag")
    evaluate(model)
    compression = compression_of(model)
    compression.set_masks([mask.flip(0) for mask in compression.masks()])
    torch.testing.assert_close(evaluate(model), expected_of(model))


def test_what_is_kept_goes_with_training_and_with_release(computed):
    model = make("low_rank")
    for let_go in (memfold.release, step):
        evaluate(model)
        assert len(compression_of(model)._kept._kept) == 2
        let_go(model)
        assert not compression_of(model)._kept._kept


def test_inference_mode_and_gradients_do_not_meet_the_same_weights(computed):
    model = make("mag")
    with torch.inference_mode():
        model(torch.ones(1, 8, dtype=torch.float64))
    evaluate(model)
    assert computed == [0, 1, 0, 1]
    x = torch.ones(1, 8, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    mapped = torch.func.vmap(model)(torch.ones(2, 1, 8, dtype=torch.float64))
    assert mapped.shape == (2, 1, 5)


def test_all_that_is_kept_has_to_fit(monkeypatch):
    asked = []

    def has_room(size, device):
        asked.append(size)
        return True

    monkeypatch.setattr("memfold.compression.kept_weights.has_room", has_room)
    model = make("mag")
    evaluate(model)
    values = [part.nbytes for part in compression_of(model).part_tensors()]
    assert asked == [8 * 96 + values[0], 8 * (96 + 60) + sum(values)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_of_every_part_are_seen():
    model = make("low_rank")
    x = torch.ones(2, 8, dtype=torch.float64)
    with torch.no_grad():
        for part in ("weight_left", "weight_right"):
            model(x)
            values = getattr(model[0], part)
            direction = torch.ones_like(values)
            with forward_ad.dual_level():
                del model[0]._parameters[part]
                setattr(model[0], part, forward_ad.make_dual(values, direction))
                output = model(x)
                tangent = forward_ad.unpack_dual(output).tangent
            delattr(model[0], part)
            model[0].register_parameter(part, values)
            assert tangent is not None
            assert tangent.any()
