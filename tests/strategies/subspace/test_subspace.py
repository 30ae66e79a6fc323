"""Coordinates: where they start, what they move and how far, in every process and every file."""

import gc
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfold
from memfold.compression import Context, compression_of
from memfold.errors import InputError
from memfold.strategies.subspace.draws import Draws
from memfold.strategies.subspace.subspace import Subspace
from memfold.strategies.subspace.weights import SubspaceWeights
from training.jobs import PYTHONPATH

KINDS = ("fastfood", "dense", "sparse")
WAYS = [{"projection": kind, "per": per} for kind, per in product(KINDS, ("model", "weight"))]
FEATURES = 12


def dense_network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh(), nn.Linear(20, 7)).double()


def network(ratio: float = 0.1, seed: int = 5, **options: Any) -> nn.Sequential:
    return memfold.compress(dense_network(), "subspace", ratio=ratio, seed=seed, **options)


def subspace_of(model: nn.Module) -> SubspaceWeights:
    subspace = compression_of(model)
    assert isinstance(subspace, SubspaceWeights)
    return subspace


def move(model: nn.Module) -> nn.Module:
    """Put coordinates somewhere."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for part in subspace_of(model).part_tensors():
            part.copy_(torch.randn(len(part), generator=generator, dtype=torch.float64))
    return model


def weights_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([weight.flatten() for weight in subspace_of(model).dense_weights()])


def coordinates_of(model: nn.Module) -> Tensor:
    return torch.cat([part.detach() for part in subspace_of(model).part_tensors()])


def explicit(model: nn.Module) -> Tensor:
    """Return P and the factor of every weight as one matrix: shape (weights, coordinates)."""
    parts = []
    for found in subspace_of(model).projections:
        eye = torch.eye(found.columns, dtype=torch.float64)
        gain = (found.height / found.columns) ** 0.5
        parts.append(gain * torch.func.vmap(found)(eye).T)
    shared = len([*subspace_of(model).part_tensors()]) == 1
    return torch.cat(parts) if shared else torch.block_diag(*parts)


def loss_of(model: nn.Module) -> Tensor:
    x = torch.linspace(-2, 2, 5 * FEATURES, dtype=torch.float64).sin().view(5, FEATURES)
    return model(x).square().mean()


@pytest.mark.parametrize("ratio", [0.01, 0.3])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_at_first_the_weights_are_the_random_point_bit_for_bit(
    way: dict[str, str], ratio: float
) -> None:
    model = network(ratio, **way)
    assert not coordinates_of(model).any()
    dense = dense_network()
    for name, found in memfold.densify(model).state_dict().items():
        tensor = dense.state_dict()[name]
        if name.endswith("bias"):
            assert torch.equal(found, tensor)
            continue
        spread = float(tensor.std().float())
        expected = Draws(5, "start", name).uniform(tensor.numel(), spread, tensor)
        assert torch.equal(found, expected.view_as(tensor))
        assert float(found.std()) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_weights_and_gradients_are_those_of_the_matrix(way: dict[str, str]) -> None:
    model = network(0.2, **way)
    start, matrix = weights_of(model), explicit(model)
    move(model)
    moved = weights_of(model)
    torch.testing.assert_close(moved, start + matrix @ coordinates_of(model), rtol=0, atol=1e-12)
    # The gradient leaves the factor out.
    dense = memfold.densify(model)
    loss_of(model).backward()
    loss_of(dense).backward()
    found = torch.cat([part.grad for part in subspace_of(model).part_tensors()])
    gradient = torch.cat([p.grad.flatten() for p in dense.parameters() if p.dim() > 1])
    gains = [
        torch.full((p.columns,), (p.height / p.columns) ** 0.5, dtype=torch.float64)
        for p in subspace_of(model).projections
    ]
    gain = gains[0] if way["per"] == "model" else torch.cat(gains)
    torch.testing.assert_close(found, matrix.T @ gradient / gain, rtol=0, atol=1e-13)
    for mine, its in zip(model.parameters(), dense.parameters(), strict=False):
        if mine.shape == its.shape and mine.dim() == 1:
            torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("per", ["model", "weight"])
def test_as_many_coordinates_as_weights_reach_any_point(per: str) -> None:
    model = network(1.0, projection="dense", per=per)
    target = torch.linspace(-3, 4, 20 * FEATURES + 140, dtype=torch.float64)
    found = torch.linalg.solve(explicit(model), target - weights_of(model))
    parts = [*subspace_of(model).part_tensors()]
    with torch.no_grad():
        for part, values in zip(parts, found.split([*map(len, parts)]), strict=True):
            part.copy_(values)
    torch.testing.assert_close(weights_of(model), target, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_learning_rate_serves_every_ratio(kind: str, ratio: float) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(40, 50, bias=False), nn.Linear(50, 20, bias=False))
    model = memfold.compress(dense, "subspace", ratio=ratio, projection=kind)
    direction = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    lengths = []
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        before = weights_of(model)
        steps = optimizer(model.parameters(), lr=0.01)
        steps.zero_grad()
        (torch.cat([layer.weight.flatten() for layer in model]) @ direction).backward()
        steps.step()
        lengths.append(float((weights_of(model) - before).norm()))
    # Those of the dense model: 0.01 |gradient|, and 0.01 for every weight.
    assert lengths[0] == pytest.approx(0.01 * float(direction.norm()), rel=0.35)
    assert lengths[1] == pytest.approx(0.01 * 3000**0.5, rel=0.25)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_clipped_gradient_counts_the_weights_that_move(way: dict[str, str]) -> None:
    model = network(0.3, **way)
    lengths = explicit(model).norm(dim=0)
    found = [subspace_of(model).reach(part) for part in subspace_of(model).part_tensors()]
    reach = torch.cat([part for part in found if part is not None])
    assert float((lengths / reach).mean()) == pytest.approx(1, abs=0.05)
    assert subspace_of(model).reach(model[0].bias) is None


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_files_and_state_dicts_carry_the_function(way: dict[str, str], tmp_path: Path) -> None:
    model = move(network(0.2, **way))
    expected = weights_of(model)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", dense_network(seed=2))
    assert torch.equal(weights_of(loaded), expected)
    other = memfold.compress(dense_network(seed=3), "subspace", ratio=0.2, seed=5, **way)
    assert not torch.equal(weights_of(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(weights_of(other), expected)
    flat = torch.cat(
        [p.detach().flatten() for p in memfold.densify(model).parameters() if p.dim() > 1]
    )
    assert torch.equal(flat, expected)


def test_an_evaluation_sees_the_scales_of_another_state_dict() -> None:
    model, other = network().eval(), memfold.compress(dense_network(2), "subspace", seed=5)
    x = torch.ones(1, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), other.eval()(x))
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("option", [{"projection": "sparse"}, {"seed": 6}, {"ratio": 0.101}])
def test_coordinates_of_other_directions_are_refused(option: dict[str, Any]) -> None:
    model, other = network(), network(**option)
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=r"belong to another seed|size misma"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("scales", [None, [1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_scales_that_do_not_fit_are_refused(scales: list[float] | None) -> None:
    tensors = {"subspace_values": torch.zeros(38)}
    if scales is not None:
        tensors["subspace_scales"] = torch.tensor(scales)
    model = dense_network()
    with pytest.raises(InputError, match="subspace_scales must be 2 finite numbers above 0"):
        Subspace().restore(model, ["0.weight", "2.weight"], 38, tensors)
    assert compression_of(model) is None


@pytest.mark.parametrize(("per", "count"), [("model", 0), ("weight", 1), ("model", 381)])
def test_a_number_of_coordinates_that_cannot_be_is_refused(per: str, count: int) -> None:
    tensors = {"subspace_values": torch.zeros(count), "subspace_scales": torch.ones(2)}
    strategy = Subspace(per="weight") if per == "weight" else Subspace()
    with pytest.raises(InputError, match=f"the artifact has {count} coordinates, not [12] to 380"):
        strategy.restore(dense_network(), ["0.weight", "2.weight"], count, tensors)


def digests() -> list[str]:
    """Hash the weights of every way."""
    models = (move(network(0.2, **way)) for way in WAYS)
    return [hashlib.sha256(weights_of(model).numpy().tobytes()).hexdigest() for model in models]


def test_two_processes_have_the_same_weights() -> None:
    code = (
        "import json; from strategies.subspace.test_subspace import digests\n"
        "print(json.dumps(digests()))"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == digests()
    assert len({*digests()}) == len(WAYS)


@pytest.fixture
def new_tensors() -> Iterator[Any]:
    """Return a function that counts the numbers in living tensors that were not there before."""

    def living() -> list[int]:
        gc.collect()
        things = gc.get_objects()
        return [thing.numel() for thing in things if issubclass(type(thing), Tensor)]

    gc.freeze()
    yield living
    gc.unfreeze()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_a_weight_stays(kind: str, new_tensors: Any) -> None:
    model = network(0.1, projection=kind)
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    assert max(new_tensors()) == 38  # coordinates; the smaller weight has 140
    assert subspace_of(model).resident_bytes == 8


def test_each_weight_has_coordinates_in_proportion() -> None:
    model = network(0.1, per="weight")
    assert [len(part) for part in subspace_of(model).part_tensors()] == [24, 14]
    assert memfold.footprint(model).num_values == 38
    message = "ratio=0.003 gives 1 coordinates for 2 weights; compression.per=weight needs one"
    with pytest.raises(InputError, match=re.escape(message)):
        network(0.003, per="weight")
    assert memfold.footprint(network(0.003)).num_values == 1


def test_padding_stays_zero() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 3)).double()
    move(memfold.compress(model, "subspace", ratio=0.5))
    table = model[0].weight
    assert not table[2].any()
    assert bool(table[[0, 1, 3]].all())
    (gradient,) = torch.autograd.grad(table[2].sum(), model.subspace_values)
    assert not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_lowers_no_projection(kind: str) -> None:
    model = memfold.compress(dense_network().float(), "subspace", projection=kind)
    with torch.no_grad():
        model.subspace_values.copy_(torch.linspace(-1, 1, 38))
    expected = model[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].weight, expected)
        loss = model(torch.ones(2, FEATURES)).float().square().mean()
    loss.backward()
    assert model.subspace_values.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # what the compiler itself does
def test_the_compiler_makes_one_graph() -> None:
    x = torch.ones(1, FEATURES, dtype=torch.float64)
    for kind in KINDS:
        model = move(network(projection=kind))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        compiled(x).sum().backward()
        found = model.subspace_values.grad.clone()
        model.zero_grad()
        model(x).sum().backward()
        assert torch.equal(found, model.subspace_values.grad)


def test_values_to_start_from_are_refused() -> None:
    model = dense_network()
    with pytest.raises(InputError, match=r"^init_from gives weights, and subspace keeps none"):
        Subspace().compress(model, Context(start=lambda _: None))
    assert compression_of(model) is None
