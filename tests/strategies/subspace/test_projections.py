"""Projections against explicit matrices, and random numbers against what they should look like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memfold.strategies.subspace.draws import Draws
from memfold.strategies.subspace.projections import PROJECTIONS, Kind, Projection, hadamard

KINDS: tuple[Kind, ...] = ("fastfood", "dense", "sparse")
CPU = torch.device("cpu")
WIDE = torch.empty(0, dtype=torch.float64)


def projection(kind: Kind, rows: int, columns: int, height: int | None = None) -> Projection:
    return PROJECTIONS[kind](3, "layer.weight", rows, columns, rows if height is None else height)


def matrix_of(found: Projection) -> Tensor:
    """Return P, what it makes of all unit vectors: shape (rows, columns)."""
    return torch.func.vmap(found)(torch.eye(found.columns, dtype=torch.float64)).T


def explicit_hadamard(size: int) -> Tensor:
    """H_ij = (-1)^(number of ones in i and j), by its definition."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 8])
def test_the_transform_is_that_of_the_definition_and_its_own_inverse(bits: int) -> None:
    size = 1 << bits
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    torch.testing.assert_close(hadamard(x), explicit_hadamard(size) @ x, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-12)


def test_the_gradient_of_the_transform_is_the_transform() -> None:
    x, upper = torch.randn(2, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(hadamard(x), x, upper)
    torch.testing.assert_close(gradient, hadamard(upper), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1 << 18, 1 << 20])
def test_long_transforms_keep_the_length_in_single_precision(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    assert float(hadamard(x).norm() / x.norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(rows=st.integers(1, 80), columns=st.integers(1, 40), more=st.integers(0, 100))
def test_the_way_back_is_the_adjoint(kind: Kind, rows: int, columns: int, more: int) -> None:
    found = projection(kind, rows, columns, rows + more)
    matrix = matrix_of(found)
    assert matrix.shape == (rows, columns)
    x = torch.linspace(-1, 2, columns, dtype=torch.float64)
    y = torch.linspace(-3, 1, rows, dtype=torch.float64).cos()
    torch.testing.assert_close(found(x), matrix @ x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.transposed_times(y), matrix.T @ y, rtol=0, atol=1e-12)
    torch.testing.assert_close(found(x) @ y, x @ found.transposed_times(y), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_any_order(kind: Kind) -> None:
    found = projection(kind, 13, 5)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)

    def curved(x: Tensor) -> Tensor:
        return found(x).sin()

    assert torch.autograd.gradcheck(curved, x)
    assert torch.autograd.gradgradcheck(curved, x)
    batch = torch.stack((x, 2 * x)).detach()
    expected = torch.stack([found(row) for row in batch])
    torch.testing.assert_close(torch.func.vmap(found)(batch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_seamless(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfold.strategies.subspace.projections._BLOCK_NUMEL", 64)
    monkeypatch.setattr("memfold.strategies.subspace.draws._CHUNK_NUMEL", 50)
    found = projection(kind, 203, 20)
    matrix = matrix_of(found)
    y = torch.linspace(-3, 1, 203, dtype=torch.float64)
    torch.testing.assert_close(found.transposed_times(y), matrix.T @ y, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(matrix) == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1024, 60), (1000, 60), (3000, 500)])
def test_columns_have_length_1_and_are_nearly_orthogonal(
    kind: Kind, rows: int, columns: int
) -> None:
    gram = matrix_of(projection(kind, rows, columns)).T
    gram = gram @ gram.T
    lengths = gram.diagonal().sqrt()
    assert float(lengths.mean()) == pytest.approx(1, abs=0.02)
    assert float(lengths.std()) < 1.5 * rows**-0.5
    if kind == "fastfood" and rows == 1024:
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-12)
    products = gram[~torch.eye(columns, dtype=torch.bool)]
    assert float(products.std()) < 1.5 * rows**-0.5
    assert abs(float(products.mean())) < 5 * float(products.std()) / columns


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_model_share_the_length_of_a_column(kind: Kind) -> None:
    sizes = (700, 30, 1500, 64)
    parts = [
        matrix_of(PROJECTIONS[kind](3, f"{number}.weight", size, 50, sum(sizes)))
        for number, size in enumerate(sizes)
    ]
    assert float(torch.cat(parts).norm(dim=0).mean()) == pytest.approx(1, abs=0.02)
    for part, size in zip(parts, sizes, strict=True):
        share = float(part.square().sum()) / 50
        assert share == pytest.approx(size / sum(sizes), rel=0.25 if size < 100 else 0.06)


def test_as_many_columns_as_weights_reach_any_point() -> None:
    matrix = matrix_of(projection("dense", 40, 40))
    target = torch.linspace(-5, 5, 40, dtype=torch.float64)
    found = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(projection("dense", 40, 40)(found), target, rtol=0, atol=1e-10)


def test_fastfood_is_the_product_of_its_factors() -> None:
    rows, columns, size = 50, 20, 64
    found = projection("fastfood", rows, columns, 200)
    h = explicit_hadamard(size)
    signs = Draws(3, "subspace", "layer.weight", "B").signs(columns, WIDE)
    places = Draws(3, "subspace", "layer.weight", "Pi").permutation(6, CPU).long()
    normal = Draws(3, "subspace", "layer.weight", "G").normal(size, 1.0, WIDE)
    # With the transform that is not orthonormal: H G Pi H B / sqrt(D sum of G^2).
    raw = h * size**0.5
    product = raw @ normal.diag() @ torch.eye(size, dtype=torch.float64)[places] @ raw
    product = product[:rows, :columns] * signs / (200 * normal.square().sum()).sqrt()
    torch.testing.assert_close(matrix_of(found), product, rtol=0, atol=1e-12)


def test_sparse_columns_have_one_entry_in_every_stretch() -> None:
    matrix = matrix_of(projection("sparse", 400, 30))
    assert torch.equal(matrix.view(20, 20, 30).count_nonzero(dim=1), torch.ones(20, 30).long())
    assert {round(value, 12) for value in matrix.unique().tolist()} == {
        -round(20**-0.5, 12),
        0.0,
        round(20**-0.5, 12),
    }


@pytest.mark.parametrize("bits", [0, 1, 2, 5, 10, 13])
def test_a_stream_of_so_many_bits_is_a_permutation(bits: int) -> None:
    found = Draws(1, "x").permutation(bits, CPU)
    assert torch.equal(found.sort().values, torch.arange(1 << bits, dtype=torch.int32))


def test_parts_of_a_stream_are_those_of_the_whole() -> None:
    draws = Draws(1, "x")
    assert torch.equal(draws.integers(100, 300, "cpu"), draws.integers(0, 400, "cpu")[100:300])


@pytest.mark.parametrize("kind", ["uniform", "normal", "signs"])
def test_streams_look_random(kind: str) -> None:
    count, streams = 1 << 12, 64
    drawn = torch.stack(
        [
            Draws(seed, kind, "layer.weight").signs(count, WIDE)
            if kind == "signs"
            else getattr(Draws(seed, kind, "layer.weight"), kind)(count, 1.0, WIDE)
            for seed in range(streams)
        ]
    )
    # Each is about a standard normal number, of which there are 64 to 2016.
    scores = {
        "mean": drawn.sum(1) / count**0.5,
        **{
            f"lag {lag}": (drawn[:, lag:] * drawn[:, :-lag]).sum(1) / (count - lag) ** 0.5
            for lag in (1, 2, 16, 64, 1024)
        },
        "other seeds": (drawn @ drawn.T).triu(1).flatten() / count**0.5,
    }
    for name, score in scores.items():
        found = score[score != 0]
        assert float(found.abs().max()) < 4.5, name
        assert float(found.std()) == pytest.approx(1, abs=0.25), name
    assert float(drawn.square().mean()) == pytest.approx(1, abs=0.01)
    if kind == "uniform":
        assert float(drawn.abs().max()) <= 3**0.5
        edges = drawn.flatten().histc(64, -(3**0.5), 3**0.5)
        assert float(edges.std()) < 1.3 * float(edges.mean()) ** 0.5


def test_the_mean_square_is_that_of_the_numbers() -> None:
    draws = Draws(5, "g")
    expected = float(draws.normal(100_000, 1.0, WIDE).square().mean())
    assert draws.mean_square(100_000) == pytest.approx(expected, rel=1e-12)


def test_names_and_seeds_give_numbers_that_stay_the_same() -> None:
    # An artifact is read with these: a change here makes all of them unreadable.
    for kind, expected in PRODUCTS.items():
        found = projection(kind, 30, 20)(torch.arange(20, dtype=torch.float64))
        torch.testing.assert_close(found[[0, 17]], torch.tensor(expected, dtype=torch.float64))
    assert Draws(7, "start", "0.weight").integers(0, 4, "cpu").tolist() == KNOWN
    assert Draws(7, "start", "1.weight").integers(0, 4, "cpu").tolist() != KNOWN
    assert Draws(8, "start", "0.weight").integers(0, 4, "cpu").tolist() != KNOWN


PRODUCTS: dict[Kind, list[float]] = {
    "fastfood": [12.917093019973, 13.107755878821],
    "dense": [10.989402230517, -0.916793858611],
    "sparse": [1.224744871392, 8.164965809277],
}
KNOWN = [370634055, 484237061, 1546560488, 1590426133]
