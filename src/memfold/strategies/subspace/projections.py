"""Random linear maps from few coordinates to many weights, computed again for every product.

Each is the rows of one weight, shape (rows, columns), out of a matrix with `height` rows in all,
whose columns have the length 1: its entries have the variance 1 / height.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from memfold.strategies.subspace.draws import Draws

__all__ = ["PROJECTIONS", "Kind", "Projection", "hadamard"]

Kind = Literal["fastfood", "dense", "sparse"]
# Entries of a matrix that exist at a time. Each block has a stream of its own, so that this decides
# what P is, too.
_BLOCK_NUMEL = 1 << 18


class Projection(ABC):
    """P, known by its seed and the name of the weight."""

    def __init__(self, seed: int, name: str, rows: int, columns: int, height: int) -> None:
        """Take note of the shape.

        Args:
            seed: Of the strategy.
            name: Of the weight.
            rows: Numbers in it.
            columns: Coordinates.
            height: Numbers in all the weights that these coordinates move.
        """
        self.rows = rows
        self.columns = columns
        self.height = height
        self._parts = seed, "subspace", name

    def __call__(self, coordinates: Tensor) -> Tensor:
        """Return P x for x of shape (columns,): shape (rows,), differentiable any number of times.

        Both are of the same dtype, float32 or float64.
        """
        return _Multiply.apply(coordinates, self, False)

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """Return P x, shape (rows,)."""

    @abstractmethod
    def transposed_times(self, y: Tensor) -> Tensor:
        """Return P' y, shape (columns,)."""

    def draws(self, *parts: int | str) -> Draws:
        """Return the stream of that name."""
        return Draws(*self._parts, *parts)


class _Multiply(torch.autograd.Function):
    """P x, or P' y; each is the gradient of the other, and P is computed anew for both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, projection: Projection, transposed: bool) -> Tensor:
        return projection.transposed_times(x) if transposed else projection.times(x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.projection, ctx.transposed = inputs  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        projection, transposed = ctx.projection, ctx.transposed  # type: ignore[attr-defined]
        return _Multiply.apply(grads[0], projection, not transposed), None, None


class Fastfood(Projection):
    """P x = c H G Pi H B x, x filled up with zeros to a power of two, the result cut to the rows.

    H is the orthonormal Walsh-Hadamard transform, G diagonal and nearly normal, Pi a permutation, B
    diagonal signs. Where nothing is cut, all columns have the same length.
    """

    def __init__(self, seed: int, name: str, rows: int, columns: int, height: int) -> None:
        """See `Projection`."""
        super().__init__(seed, name, rows, columns, height)
        self._bits = (max(rows, columns) - 1).bit_length()
        size = 1 << self._bits
        self._signs, self._permutation, self._normal = map(self.draws, ("B", "Pi", "G"))
        self._spread = (size / height / self._normal.mean_square(size)) ** 0.5

    def times(self, x: Tensor) -> Tensor:
        """See `Projection.times`."""
        mixed = hadamard(self._fill_up(x * self._signs.signs(self.columns, x)))
        moved = mixed.index_select(0, self._permutation.permutation(self._bits, x.device))
        return hadamard(self._scaled(moved))[: self.rows]

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Projection.transposed_times`."""
        mixed = self._scaled(hadamard(self._fill_up(y)))
        places = self._permutation.permutation(self._bits, y.device)
        moved = hadamard(torch.zeros_like(mixed).index_add(0, places, mixed))
        return moved[: self.columns] * self._signs.signs(self.columns, y)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self._normal.normal(1 << self._bits, self._spread, x)

    def _fill_up(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, (1 << self._bits) - x.shape[0]))


class Dense(Projection):
    """Nearly normal entries, drawn block by block."""

    def __init__(self, seed: int, name: str, rows: int, columns: int, height: int) -> None:
        """See `Projection`."""
        super().__init__(seed, name, rows, columns, height)
        self._block = max(1, _BLOCK_NUMEL // columns)
        self._streams = [self.draws(begin) for begin in range(0, rows, self._block)]

    def times(self, x: Tensor) -> Tensor:
        """See `Projection.times`."""
        return torch.cat([block @ x for _, block in self._blocks(x)])

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Projection.transposed_times`."""
        products = (y[rows] @ block for rows, block in self._blocks(y))
        return sum(products, y.new_zeros(self.columns))

    def _blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for number, stream in enumerate(self._streams):
            begin = number * self._block
            rows = slice(begin, min(begin + self._block, self.rows))
            count = (rows.stop - begin) * self.columns
            drawn = stream.normal(count, self.height**-0.5, like)
            yield rows, drawn.view(-1, self.columns)


class Sparse(Projection):
    """One entry of a random sign, at a random row, in every column and every sqrt(height) rows.

    Of the last rows, which may be fewer, some columns have none.
    """

    def __init__(self, seed: int, name: str, rows: int, columns: int, height: int) -> None:
        """See `Projection`."""
        super().__init__(seed, name, rows, columns, height)
        self._step = round(height**0.5)
        self._entry = (self._step / height) ** 0.5
        self._strata = -(-rows // self._step)
        self._block = max(1, _BLOCK_NUMEL // columns)
        self._streams = [self.draws(begin) for begin in range(0, self._strata, self._block)]

    def times(self, x: Tensor) -> Tensor:
        """See `Projection.times`."""
        pieces = [
            x.new_zeros(count).index_add(0, places.flatten(), (signs * x).flatten())
            for count, places, signs in self._blocks(x)
        ]
        return torch.cat(pieces)[: self.rows]

    def transposed_times(self, y: Tensor) -> Tensor:
        """See `Projection.transposed_times`."""
        out, begin = y.new_zeros(self.columns), 0
        for count, places, signs in self._blocks(y):
            part = y[begin : begin + count]
            part = torch.nn.functional.pad(part, (0, count - part.shape[0]))
            out = out + (signs * part[places]).sum(0)
            begin += count
        return out

    def _blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield a number of rows, and for each column its places there and its entries."""
        for number, stream in enumerate(self._streams):
            count = min(self._block, self._strata - number * self._block)
            drawn = stream.integers(0, count * self.columns, like.device)
            places = (drawn >> 1).remainder_(self._step).view(count, self.columns)
            places += torch.arange(count, device=like.device)[:, None] * self._step
            signs = (drawn & 1).mul_(2).sub_(1).to(like).mul_(self._entry).view(count, -1)
            yield count * self._step, places, signs


PROJECTIONS: dict[Kind, type[Projection]] = {
    "fastfood": Fastfood,
    "dense": Dense,
    "sparse": Sparse,
}


def hadamard(x: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of x, its own inverse and its own gradient.

    Args:
        x: Shape (size,), a power of two; float32 or float64.
    """
    size = x.shape[0]
    bits = size.bit_length() - 1
    # Each product transforms the last bits of all places and makes them the first: after the last
    # one, all bits are where they were.
    while bits > 0:
        step = min(bits, _MATRIX_BITS)
        matrix = _MATRIX[: 1 << step, : 1 << step].to(x)
        x = (matrix @ x.view(-1, 1 << step).T).reshape(-1)
        bits -= step
    return x * size**-0.5


def _hadamard_matrix(bits: int) -> Tensor:
    """Return the matrix of the transform without its factor, whose corners are smaller ones."""
    matrix = torch.ones(1, 1, device="cpu")
    for _ in range(bits):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


_MATRIX_BITS = 6
_MATRIX = _hadamard_matrix(_MATRIX_BITS)
