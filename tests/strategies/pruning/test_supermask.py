"""Supermasks: exact counts, random weights that never change, one bit per weight in a file."""

import copy
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW

import memfold
from memfold.artifact import header_bytes
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.memory import train_state_bytes
from memfold.strategies.pruning.encoding import cheapest
from memfold.strategies.pruning.masks import keep_counts
from memfold.strategies.pruning.supermask import SupermaskWeights
from strategies.models import build, make_input
from training.jobs import PYTHONPATH


def dense_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6)
    )


def network(ratio: float | None = 0.3, seed: int = 5, **options: Any) -> nn.Sequential:
    return memfold.compress(dense_network(), "supermask", ratio=ratio, seed=seed, **options)


def supermask_of(net: nn.Module) -> SupermaskWeights:
    supermask = compression_of(net)
    assert isinstance(supermask, SupermaskWeights)
    return supermask


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 6, 6, generator=generator)
    return images, torch.randn(16, 6, generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs, targets = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(net(inputs), targets).backward()
        optimizer.step()


def random_weights(supermask: SupermaskWeights) -> list[Tensor]:
    """The network as drawn: every weight, kept or not."""
    pairs = zip(supermask.signs, supermask.scales, strict=True)
    return [signs.to(supermask.dtype) * scale for signs, scale in pairs]


def check(supermask: SupermaskWeights) -> None:
    """The counts are exact, and what is kept is as it was drawn."""
    masks = supermask.masks()
    assert [int(mask.sum()) for mask in masks] == supermask.kept
    for index, (mask, drawn) in enumerate(zip(masks, random_weights(supermask), strict=True)):
        assert torch.equal(supermask.weight(index), drawn * mask)


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_training_moves_masks_and_no_weight(make: type[SGD] | type[AdamW]) -> None:
    net = network()
    supermask = supermask_of(net)
    assert supermask.kept == [round(0.3 * 8 * 27), round(0.3 * 6 * 128)]
    drawn, masks = random_weights(supermask), supermask.masks()
    optimizer = make(net.parameters(), lr=0.05, weight_decay=1e-3)
    for _ in range(4):
        train(net, optimizer, 2)
        check(supermask)
        assert all(map(torch.equal, random_weights(supermask), drawn))
    assert not any(map(torch.equal, supermask.masks(), masks))


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=24),
    st.floats(0.01, 1),
)
def test_of_equal_scores_the_first_are_kept(scores: list[int], ratio: float) -> None:
    layer = memfold.compress(
        nn.Linear(len(scores), 1, bias=False), "supermask", ratio=ratio, structured="share"
    )
    supermask = supermask_of(layer)
    with torch.no_grad():
        layer.weight_scores.copy_(torch.tensor([scores], dtype=torch.float32))
    (mask,) = supermask.masks()
    count = max(1, round(ratio * len(scores)))
    assert torch.equal(mask, keep_counts([layer.weight_scores.abs()], [count])[0])
    check(supermask)


@pytest.mark.parametrize("name", ["tied", "attention", "lstm", "conv3d", "functional"])
def test_scores_get_the_weight_times_its_gradient(name: str) -> None:
    model = memfold.compress(build(name), "supermask", ratio=0.6)
    dense = memfold.densify(model)
    for net in (model, dense):
        net(make_input(name)).square().sum().backward()
    supermask = supermask_of(model)
    for index, drawn in enumerate(random_weights(supermask)):
        gradient = dense.get_parameter(supermask.names[index]).grad
        scores = supermask.part(index, "scores")
        assert gradient is not None
        torch.testing.assert_close(scores.grad, gradient * drawn * scores.detach().sign())


def test_the_sign_of_a_score_does_not_matter() -> None:
    net, other = network(), network()
    with torch.no_grad():
        for name, scores in other.named_parameters():
            if name.endswith("_scores"):
                scores.mul_(-1)
    inputs, _ = batch()
    assert torch.equal(net(inputs), other(inputs))
    for model in (net, other):
        train(model, SGD(model.parameters(), lr=0.05, momentum=0.9), 3)
    assert torch.equal(net(inputs), other(inputs))


def test_a_score_of_zero_can_grow() -> None:
    net = network()
    with torch.no_grad():
        net[4].weight_scores.zero_()
    net(batch()[0]).square().sum().backward()
    assert (net[4].weight_scores.grad != 0).all()


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_all_kept_is_the_random_network(gain: float) -> None:
    net = network(1.0, gain=gain)
    supermask = supermask_of(net)
    for layer, drawn, fan_in in ((net[0], 0, 27), (net[4], 1, 128)):
        assert torch.equal(layer.weight, random_weights(supermask)[drawn])
        sizes = layer.weight.detach().abs()
        torch.testing.assert_close(sizes, torch.full_like(sizes, gain / math.sqrt(fan_in)))
    assert memfold.footprint(net).index_bytes == 2 * 8 + 8


def test_what_is_kept_has_the_variance_of_kaimings_initialisation() -> None:
    net = network(0.25)
    for layer, fan_in in ((net[0], 27), (net[4], 128)):
        mean_square = float(layer.weight.detach().square().mean())
        assert mean_square == pytest.approx(2 / fan_in, rel=1e-6)


def test_signs_are_fair_and_scores_are_kaimings() -> None:
    layer = memfold.compress(nn.Linear(256, 400), "supermask")
    (signs,) = supermask_of(layer).signs
    scores = layer.weight_scores.detach()
    # 102,400 fair signs: a standard deviation of the mean of 0.003.
    assert abs(float(signs.float().mean())) < 0.015
    assert abs(float((signs.sign() * scores.sign()).mean())) < 0.015
    assert float(scores.abs().max()) <= 1 / 16
    assert float(scores.std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)


def digest() -> str:
    whole = hashlib.sha256()
    for drawn in random_weights(supermask_of(network())):
        whole.update(drawn.numpy().tobytes())
    return whole.hexdigest()


def test_the_seed_draws_the_same_weights_in_a_new_process() -> None:
    code = "from strategies.pruning.test_supermask import digest; print(digest())"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert digest() == done.stdout.strip()


def test_half_of_the_weights_take_one_bit_per_weight(tmp_path: Path) -> None:
    net = network(None)
    counted = memfold.footprint(net)
    assert supermask_of(net).kept == [8 * 27 // 2, 6 * 128 // 2]
    assert counted.ratio == 0.5
    assert counted.value_bytes == 0
    assert counted.index_bytes == (8 * 27 + 6 * 128) // 8 + 2 * 8 + 8
    assert supermask_of(net).index_format == "bitmask 2"
    path = tmp_path / "a.safetensors"
    assert memfold.save(net, path) == counted.stored_bytes + header_bytes(path)
    assert memfold.save(net, path, bits=4) == counted.stored_bytes + header_bytes(path)


@pytest.mark.parametrize("ratio", [0.002, 0.03, 0.5, 1.0])
def test_an_artifact_has_the_function_and_makes_the_same_artifact(
    ratio: float, tmp_path: Path
) -> None:
    net = network(ratio)
    train(net, SGD(net.parameters(), lr=0.05), 3)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    size = memfold.save(net, paths[0])
    assert size == memfold.footprint(net).stored_bytes + header_bytes(paths[0])
    loaded = memfold.load(paths[0], dense_network())
    inputs, _ = batch()
    assert torch.equal(loaded.eval()(inputs), net.eval()(inputs))
    assert torch.equal(memfold.densify(loaded)(inputs), net(inputs))
    memfold.save(loaded, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_checkpoint_keeps_the_scores() -> None:
    net, other = network(), network()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    train(net, optimizer, 2)
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 2)
    resumed = SGD(other.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, 2)
    assert all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("options", [{"seed": 6}, {"ratio": 0.4}, {"gain": 1.0}])
def test_scores_of_other_random_weights_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="belong to random weights of another seed, ratio, gain"):
        network().load_state_dict(network(**options).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept_fingerprint": torch.tensor(3)}, "belong to random weights of another"),
        ({"kept_counts": torch.tensor([65, 0])}, "kept_index must be"),
        ({"kept_index": torch.zeros(3, dtype=torch.uint8)}, "kept_index must be"),
    ],
)
def test_damaged_artifacts_are_refused(change: Mapping[str, Tensor], message: str) -> None:
    supermask = supermask_of(network())
    tensors = {**supermask.index_tensors(), **change}
    net = dense_network()
    names = list(net.state_dict())
    with pytest.raises(InputError, match=message):
        supermask.strategy.restore(net, supermask.names, supermask.num_values, tensors)
    assert list(net.state_dict()) == names


def test_a_budget_keeps_the_most_that_the_index_allows_and_half_at_most(tmp_path: Path) -> None:
    shapes = [torch.Size((8, 3, 3, 3)), torch.Size((6, 128))]
    untouched = memfold.footprint(network()).untouched_bytes
    total = sum(shape.numel() for shape in shapes)

    def index(share: float) -> int:
        counts = [max(1, round(share * shape.numel())) for shape in shapes]
        return 8 + sum(8 + cheapest(n, s)[1] for n, s in zip(counts, shapes, strict=True))

    odd = memfold.compress(nn.Linear(7, 1), "supermask", budget_bytes=1000)
    assert supermask_of(odd).kept == [round(0.5 * 7)] == [4]
    for budget in (untouched + 650, untouched + 670, untouched + 700, untouched + 720):
        net = network(None, budget_bytes=budget)
        header = memfold.save(net, tmp_path / "a") - memfold.footprint(net).stored_bytes
        room = budget - header - untouched
        assert memfold.footprint(net).index_bytes <= room
        more = (sum(supermask_of(net).kept) + 2) / total
        assert index(more) + 8 > room  # the header has sizes in steps of 8


@pytest.mark.parametrize("gain", [0, -1.0, float("inf"), "relu"])
def test_a_bad_gain_is_named(gain: Any) -> None:
    with pytest.raises(InputError, match=r"compression.gain must be a number above 0"):
        network(gain=gain)


def test_scores_and_signs_are_in_the_train_state() -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    train(net, optimizer, 1)
    scores, others = 8 * 27 + 6 * 128, 8 + 8 + 8 + 6
    buffers = 4 * (8 + 8) + 8
    # Parameter, gradient and momentum, and one byte per sign.
    expected = 12 * (scores + others) + buffers + scores
    assert train_state_bytes(net, optimizer) == expected


def test_a_padding_row_stays_zero() -> None:
    model = memfold.compress(build("embedding"), "supermask", ratio=0.6)
    optimizer = SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        model(make_input("embedding")).square().sum().backward()
        optimizer.step()
    assert not model[0].weight[0].any()
    check(supermask_of(model))


def test_the_untouched_parameters_are_trained() -> None:
    net = network()
    before = [net[1].weight.detach().clone(), net[4].bias.detach().clone()]
    train(net, SGD(net.parameters(), lr=0.05), 1)
    assert not torch.equal(net[1].weight, before[0])
    assert not torch.equal(net[4].bias, before[1])


def test_other_dtypes_have_the_same_signs_and_counts() -> None:
    net = network()
    half = copy.deepcopy(net).to(torch.bfloat16)
    check_half = supermask_of(half)
    assert [int(mask.sum()) for mask in check_half.masks()] == check_half.kept
    assert half[4].weight.dtype == torch.bfloat16
    assert net[4].weight.dtype == torch.float32
    with torch.inference_mode():
        half(batch()[0].bfloat16())
    half(batch()[0].bfloat16()).sum().backward()
