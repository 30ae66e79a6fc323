"""Scoring any model on any data: nothing changes, and what cannot be scored is said in one line."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memfold.compression.samples import first_input, take_samples
from memfold.errors import InputError
from memfold.strategies.pruning.scoring import (
    check_scores,
    snip_scores,
    synflow_scores,
)
from strategies.models import MODELS, build, make_input
from strategies.pruning.scorers import SCORERS, batches_of, conv_net, joined, mlp, named


def everything(model):
    """All that scoring must leave as it is."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [
            (p.requires_grad, p.grad if p.grad is None else p.grad.clone(), p.data_ptr())
            for p in model.parameters()
        ],
        torch.get_rng_state(),
    )


def assert_same(found, expected):
    assert found[1] == expected[1]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for (trains, grad, place), (trained, old, old_place) in zip(found[2], expected[2], strict=True):
        assert trains == trained
        assert place == old_place
        assert (grad is None and old is None) or torch.equal(grad, old)
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_the_model_is_not_touched(kind, fails):
    model = conv_net()
    model[1].eval()
    model[8].bias.requires_grad_(False)
    batches = batches_of((2, 6, 6), dtype=torch.float32)
    model(batches[0][0]).square().sum().backward()
    if fails:
        with torch.no_grad():
            model[4].weight[0, 0] = torch.nan
    before = everything(model)
    if fails:
        with pytest.raises(InputError, match=r"not finite|is nan"):
            SCORERS[kind](model, batches, F.cross_entropy)
    else:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            SCORERS[kind](model, batches, F.cross_entropy)
    assert_same(everything(model), before)


def test_random_layers_and_loaders_leave_the_global_generator_alone():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(6, 3), Noise())
    dataset = torch.utils.data.TensorDataset(*joined(batches_of((6,), dtype=torch.float32)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    batches, loss = take_samples("snip", loader, F.cross_entropy, num_samples=10)
    snip_scores(model, named(model), batches, loss)
    first_input("synflow", loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_half_precision_is_scored_in_full(kind, dtype):
    half = conv_net().to(dtype)
    full = copy.deepcopy(half).float()
    batches = batches_of((2, 6, 6), dtype=dtype)
    found = SCORERS[kind](half, batches, F.cross_entropy)
    expected = SCORERS[kind](full, [(x.float(), y) for x, y in batches], F.cross_entropy)
    assert found[0].dtype == (torch.float64 if kind == "synflow" else torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_every_kind_of_model(kind, name):
    model, x = build(name), make_input(name)
    if name == "zero_head" and kind != "grasp":
        with pytest.raises(InputError, match=r"2\.weight has no weights but zeros"):
            SCORERS[kind](model, [(x, x)], lambda output, _: output.square().mean())
        return

    def loss(output, target):
        del target
        return (output + 0.1).square().mean()

    scores = SCORERS[kind](model, [(x, x)], loss)
    for score, parameter in zip(scores, named(model).values(), strict=True):
        assert score.shape == parameter.shape
        assert score.isfinite().all()
        if kind == "synflow" and not name.startswith("weight_norm"):
            assert score.any()


def test_tied_parameters_that_are_different_objects_count_as_one():
    torch.manual_seed(0)
    model = mlp(4, 4, 4).double()
    tied = copy.deepcopy(model)
    model[2].weight = model[0].weight
    tied[0].weight.data = model[0].weight.detach().clone()
    tied[2].weight = nn.Parameter(tied[0].weight.detach())
    assert tied[2].weight is not tied[0].weight
    batches = [(x, y) for x, y in batches_of((4,))]
    for kind in SCORERS:
        torch.testing.assert_close(
            SCORERS[kind](tied, batches, F.cross_entropy),
            SCORERS[kind](model, batches, F.cross_entropy),
        )


def test_unused_parameters_score_zero():
    model = nn.Sequential(nn.Linear(6, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    batches = batches_of((6,), dtype=torch.float32)
    for kind in SCORERS:
        unused, used = SCORERS[kind](model, batches, F.cross_entropy)
        assert not unused.any()
        assert used.any()


def test_samples_are_cut_and_read_no_further_than_needed():
    read = []

    def data():
        for size in (4, 4, 4):
            read.append(size)
            yield torch.ones(size, 2), torch.arange(size)

    batches, _ = take_samples("snip", data(), F.cross_entropy, num_samples=6)
    assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == [4, 2]
    assert len(read) == 2
    assert len(take_samples("snip", data(), F.cross_entropy, num_samples=99)[0]) == 3
    assert first_input("synflow", data()).shape == (1, 2)


def test_a_single_sample_at_the_end_joins_the_batch_before():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    samples, loss = take_samples("grasp", batches_of((6,)), F.cross_entropy, num_samples=15)
    assert [len(x) for x, _ in samples] == [len(y) for _, y in samples] == [7, 8]
    assert torch.equal(joined(samples)[0], joined(batches_of((6,)))[0][:15])
    SCORERS["grasp"](model, samples, loss)  # BatchNorm refuses to train on one
    pair = [(torch.ones(1, 5), torch.ones(1)), (torch.ones(1, 4), torch.ones(1))]
    lengths, _ = take_samples("snip", pair, F.mse_loss, num_samples=2)
    assert [x.shape for x, _ in lengths] == [(1, 5), (1, 4)]


BATCH = [(torch.ones(2, 3), torch.zeros(2))]
NO_SAMPLES = [
    (None, F.mse_loss, "compression=snip needs batches of data and a loss: memfold.compress(..."),
    (BATCH, None, "compression=snip needs batches of data and a loss"),
    ([], F.mse_loss, "compression=snip: data= holds no samples"),
    ([(torch.ones(0, 3), torch.ones(0))], F.mse_loss, "holds no samples"),
    ([torch.ones(2, 3)], F.mse_loss, "must give batches (input, target) of two tensors"),
    ([{"x": 1}], F.mse_loss, "of two tensors, got dict"),
]


@pytest.mark.parametrize(("data", "loss", "message"), NO_SAMPLES)
def test_samples_that_are_no_samples(data, loss, message):
    with pytest.raises(InputError, match=re.escape(message)):
        take_samples("snip", data, loss, num_samples=4)


def test_one_line_for_scores_that_say_nothing():
    model = mlp(3, 4, 2)
    parameters = named(model)
    with pytest.raises(InputError, match=r"scores of 2\.weight are not finite"):
        check_scores("mag", parameters, [torch.ones(4, 3), torch.tensor([[torch.inf]])])
    with pytest.raises(InputError, match="every score is zero; nothing passes"):
        snip_scores(model, parameters, BATCH, lambda output, target: output.sum() * 0)
    with pytest.raises(InputError, match="one element"):
        snip_scores(model, parameters, BATCH, lambda output, target: output)
    with pytest.raises(InputError, match="needs a batch of data for the shape"):
        first_input("synflow", None)
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(InputError, match=r"R through the model is 0\.0; 0\.weight has no weights"):
        synflow_scores(model, parameters, BATCH[0][0])
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        model[2].weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"R .* is inf; look at the weights of 2\.weight"):
        synflow_scores(model, parameters, BATCH[0][0])
