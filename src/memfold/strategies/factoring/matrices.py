"""Weights as matrices, their best factors, and how many columns the factors of each may have.

A kernel (out, in, k1, k2) is the matrix (out k1) x (in k2): a k1 x 1 convolution after a 1 x k2
one, with r channels between. Of any other number d of kernel dimensions the first floor(d / 2) go
with the rows and the others with the columns: (out) x (in k) for one.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "WHOLE",
    "Rule",
    "allocate_ranks",
    "frobenius_gradient",
    "largest_rank",
    "matrix_of",
    "matrix_shape",
    "num_values_at",
    "spectral_factors",
    "weight_of",
]

WHOLE = 0
"""Stands in for the rank of a tensor that stays dense."""

Shape = tuple[int, int]
Rule = Literal["equal", "proportional"]


def matrix_shape(shape: Sequence[int]) -> Shape:
    """Return rows and columns of a weight with at least two dimensions."""
    row_dims, column_dims = _split(len(shape))
    return prod(shape[dim] for dim in row_dims), prod(shape[dim] for dim in column_dims)


def matrix_of(weight: Tensor) -> Tensor:
    """Return a weight as a matrix; of two dimensions, the weight itself."""
    row_dims, column_dims = _split(weight.dim())
    return weight.permute(*row_dims, *column_dims).reshape(matrix_shape(weight.shape))


def weight_of(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `matrix_of` for a weight of this shape; the result is contiguous."""
    row_dims, column_dims = _split(len(shape))
    order = (*row_dims, *column_dims)
    permuted = matrix.view([shape[dim] for dim in order])
    return permuted.permute([order.index(dim) for dim in range(len(shape))]).contiguous()


def num_values_at(shape: Shape, rank: int) -> int:
    """Return the numbers that a matrix of this shape takes: r(rows + columns), or all if whole."""
    return prod(shape) if rank == WHOLE else rank * sum(shape)


def largest_rank(shape: Shape) -> int:
    """Return the largest r with r(rows + columns) < rows * columns; 0 when there is none."""
    return (prod(shape) - 1) // sum(shape)


def allocate_ranks(shapes: Sequence[Shape], num_values: int, rule: Rule) -> list[int]:
    """Choose ranks, one at least.

    They grow one by one: in turn (`equal`), or always the one that is then the smallest share of
    min(rows, columns) (`proportional`); of equal ones the first. Past its largest rank a matrix
    becomes whole. One whose next rank is too much for what is left stays as it is, and the others
    go on: in the end, what is left is too little for any matrix to grow.

    Args:
        shapes: Rows and columns of the matrices.
        num_values: Numbers for all of them, enough for rank one.
        rule: What grows alike.

    Returns:
        One rank per matrix; `WHOLE` where factors would not be smaller.
    """
    ranks = [min(1, largest_rank(shape)) for shape in shapes]
    left = num_values - sum(map(num_values_at, shapes, ranks))
    assert left >= 0
    steps = sorted(
        (rank / (min(shape) if rule == "proportional" else 1), index, rank)
        for index, shape in enumerate(shapes)
        for rank in range(2, largest_rank(shape) + 2)
    )
    is_full = [False] * len(shapes)
    for _, index, rank in steps:
        shape = shapes[index]
        new = rank if rank <= largest_rank(shape) else WHOLE
        cost = num_values_at(shape, new) - num_values_at(shape, ranks[index])
        is_full[index] |= cost > left
        if not is_full[index]:
            ranks[index] = new
            left -= cost
    return ranks


def spectral_factors(
    matrix: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return U = U_r sqrt(S_r) and V = V_r sqrt(S_r) of the singular value decomposition.

    In each column of U the entry of the largest size, the first of equal ones, is positive. Rows
    and columns of zeros stay exactly zero. Where a singular value is zero, both columns would be,
    and could never be trained: the column of U is then random, as long as the first one (in a
    matrix of zeros: as PyTorch's default initialisation would have it), and that of V is zero.

    Args:
        matrix: (rows, columns), finite.
        rank: r, at most min(rows, columns).
        generator: On the CPU.

    Returns:
        float64 tensors (rows, r) and (columns, r) on the CPU.
    """
    matrix = matrix.to("cpu", torch.float64)
    rows, columns = matrix.shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    first = float(values[0])
    left, values, right = left[:, :rank], values[:rank], right[:rank].T
    largest = left.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(left.gather(0, largest) < 0, -1.0, 1.0)
    is_zero = values <= first * max(rows, columns) * torch.finfo(torch.float64).eps
    roots = values.sqrt().masked_fill(is_zero, 0.0) * signs
    random = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    length = (first or (rows**0.5 + columns**0.5) / (3 * columns) ** 0.5) ** 0.5
    left = torch.where(is_zero, random * (length / rows**0.5), left * roots)
    right = right * roots
    if first > 0:
        left[~matrix.any(dim=1)] = 0.0
        right[~matrix.any(dim=0)] = 0.0
    return left, right


def frobenius_gradient(factor: Tensor, other: Tensor) -> Tensor:
    """Return the gradient of |U V^T|_F^2 / 2: U V^T V, for (U, V) in either order.

    It takes r^2 (rows + columns) operations; the product U V^T is not built.
    """
    return factor @ (other.T @ other)


def _split(num_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the dimensions that are the rows, and those that are the columns."""
    middle = 2 + (num_dims - 2) // 2
    return (0, *range(2, middle)), (1, *range(middle, num_dims))
