"""The algebra of factors: which matrix, which ranks, which factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memfold.strategies.factoring.matrices import (
    WHOLE,
    allocate_ranks,
    frobenius_gradient,
    largest_rank,
    matrix_of,
    matrix_shape,
    num_values_at,
    spectral_factors,
    weight_of,
)
from reference import low_rank as reference

SIZES = st.integers(1, 7)
MATRICES = st.tuples(SIZES, SIZES)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return spectral_factors(matrix, rank, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((5, 3), (5, 3)),
        ((5, 3, 4), (5, 12)),
        ((5, 3, 4, 2), (20, 6)),
        ((5, 3, 4, 2, 6), (20, 36)),
    ],
)
def test_matrix_shapes(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(shape) == matrix


@given(st.lists(SIZES, min_size=2, max_size=5))
def test_a_matrix_is_a_weight_in_another_order(shape: list[int]) -> None:
    weight = draw(*shape)
    matrix = matrix_of(weight)
    assert matrix.shape == matrix_shape(shape)
    back = weight_of(matrix, shape)
    assert torch.equal(back, weight)
    assert back.is_contiguous()


def test_a_product_is_two_convolutions() -> None:
    left, right = draw(5 * 3, 4), draw(2 * 3, 4, seed=1)
    weight = weight_of(left @ right.T, (5, 2, 3, 3))
    torch.testing.assert_close(weight, reference.conv_weight(left, right, (5, 2, 3, 3)))
    images = draw(2, 2, 6, 6, seed=2)
    first = right.view(2, 1, 3, 4).permute(3, 0, 1, 2)  # (r, in, 1, k2)
    second = left.view(5, 3, 1, 4).permute(0, 3, 1, 2)  # (out, r, k1, 1)
    expected = F.conv2d(F.conv2d(images, first), second)
    torch.testing.assert_close(F.conv2d(images, weight), expected)


@given(MATRICES, st.integers(1, 7), st.integers(0, 5))
def test_spectral_factors_are_balanced_and_the_nearest(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    matrix = draw(*shape, seed=seed)
    rank = min(rank, *shape)
    left, right = factors(matrix, rank)
    values = torch.linalg.svdvals(matrix)
    error = (left @ right.T - matrix).square().sum()
    torch.testing.assert_close(error, values[rank:].square().sum())
    torch.testing.assert_close(left.T @ left, values[:rank].diag())
    torch.testing.assert_close(right.T @ right, values[:rank].diag())
    largest = left.abs().argmax(dim=0)
    assert (left.gather(0, largest[None]) > 0).all()


@given(MATRICES, st.integers(1, 3))
def test_a_matrix_of_that_rank_is_its_factors(shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape)
    matrix = draw(shape[0], rank) @ draw(rank, shape[1], seed=1)
    left, right = factors(matrix, rank)
    torch.testing.assert_close(left @ right.T, matrix)


@pytest.mark.parametrize("rank_of_matrix", [0, 1])
def test_directions_of_no_size_can_still_be_trained(rank_of_matrix: int) -> None:
    matrix = draw(6, 1) @ draw(1, 5, seed=1) * rank_of_matrix
    left, right = factors(matrix, 3)
    torch.testing.assert_close(left @ right.T, matrix)
    assert torch.linalg.matrix_rank(left) == 3
    assert not right[:, rank_of_matrix:].any()
    assert torch.equal(left, factors(matrix, 3)[0])


def test_rows_and_columns_of_zeros_stay_exactly_zero() -> None:
    matrix = draw(6, 5)
    matrix[2] = 0
    matrix[:, 4] = 0
    left, right = factors(matrix, 3)
    assert not left[2].any()
    assert not right[4].any()


def test_frobenius_gradients_are_those_of_half_the_squared_norm() -> None:
    left, right = draw(6, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    half = (left @ right.T).square().sum() / 2
    of_left, of_right = torch.autograd.grad(half, (left, right))
    torch.testing.assert_close(frobenius_gradient(left, right), of_left)
    torch.testing.assert_close(frobenius_gradient(right, left), of_right)


def test_frobenius_decay_does_not_depend_on_the_gauge() -> None:
    left, right, gauge = draw(6, 3), draw(5, 3, seed=1), draw(3, 3, seed=2)
    other_left, other_right = left @ gauge, right @ torch.linalg.inv(gauge).T
    torch.testing.assert_close(other_left @ other_right.T, left @ right.T)
    # d/dU f(U Q, V Q^-T) = (gradient at U Q) Q^T, and f is the same function of U V^T.
    moved = frobenius_gradient(other_left, other_right) @ gauge.T
    torch.testing.assert_close(moved, frobenius_gradient(left, right))


@pytest.mark.parametrize("rule", ["equal", "proportional"])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    share=st.floats(0, 1),
)
def test_ranks_use_up_the_budget(rule: str, shapes: list[tuple[int, int]], share: float) -> None:
    least = sum(num_values_at(shape, min(1, largest_rank(shape))) for shape in shapes)
    total = sum(rows * columns for rows, columns in shapes)
    budget = least + round(share * (total - least))
    ranks = allocate_ranks(shapes, budget, rule)  # type: ignore[arg-type]
    expected, left = reference.grow_ranks(shapes, budget, rule)
    assert ranks == expected
    assert budget - sum(map(num_values_at, shapes, ranks)) == left
    if budget == total:
        assert ranks == [WHOLE] * len(shapes)
    for shape, rank in zip(shapes, ranks, strict=True):
        assert rank * sum(shape) < shape[0] * shape[1]
        if rank != WHOLE:
            step = min((rank + 1) * sum(shape), shape[0] * shape[1]) - rank * sum(shape)
            assert left < step


def test_the_rules_differ_in_what_is_the_same() -> None:
    shapes = [(100, 100), (200, 200), (10, 100)]
    # 22 ranks take 4,400 + 8,800 and all of the last one, whose factors would be larger.
    assert allocate_ranks(shapes, 14_200, "equal") == [22, 22, WHOLE]
    # A tenth of 100, 200 and 10.
    values = 10 * 200 + 20 * 400 + 110
    assert allocate_ranks(shapes, values, "proportional") == [10, 20, 1]
