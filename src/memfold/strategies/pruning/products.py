"""Products with a sparse matrix of which only the kept values exist.

Y = X Wt needs, for every kept value, one column of X; the gradient of X, one column of that of Y.
Both are sums of rows of a transposed matrix, weighted by the values: what PyTorch calls an
embedding bag. The gradient of a value is the product of two such columns.
"""

from functools import cache
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.compression.transforms import is_transformed

__all__ = ["KeptProduct", "RowBounds", "can_multiply", "multiply"]

# Kernels take so many samples at a time, and are several times slower with some left over.
_SAMPLES = 8
# Positions are 32-bit integers.
_MOST_WEIGHTS = 1 << 31


def can_multiply(inputs: Tensor, values: Tensor, rows: int, columns: int) -> bool:
    """Whether the kernels take this: one precision of at least 32 bits, on the CPU.

    Args:
        inputs: Shape (..., columns), or of a layer that they do not fit.
        values: The kept ones, shape (kept,).
        rows: Of the matrix.
        columns: Of the matrix.
    """
    return (
        type(values) in (Tensor, nn.Parameter)
        and inputs.device.type == values.device.type == "cpu"
        and inputs.dtype == values.dtype
        and values.dtype in (torch.float32, torch.float64)
        and inputs.shape[-1] == columns
        and rows * columns < _MOST_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed(values)
    )


class RowBounds(NamedTuple):
    """Where the kept values of a matrix lie, row by row; int32, as the kernels want it."""

    columns: Tensor
    """Of each kept value, shape (kept,)."""
    bounds: Tensor
    """Number of values before each row, and in all: shape (rows + 1,)."""

    @classmethod
    def of(cls, positions: Tensor, rows: int, columns: int) -> "RowBounds":
        """Find it.

        Args:
            positions: Sorted flat int64 indices into the matrix, shape (kept,).
            rows: Of the matrix.
            columns: Of the matrix; rows * columns below 2^31.
        """
        begins = torch.arange(0, (rows + 1) * columns, columns, device=positions.device)
        bounds = torch.searchsorted(positions, begins, out_int32=True)
        return cls(positions.int().remainder_(columns), bounds)

    def rows(self) -> Tensor:
        """Return the row of each kept value, int32 of shape (kept,)."""
        count = len(self.bounds) - 1
        numbers = torch.arange(count, dtype=torch.int32, device=self.bounds.device)
        return numbers.repeat_interleave(self.bounds.diff(), output_size=len(self.columns))

    def transposed(self, values: Tensor, columns: int) -> tuple["RowBounds", Tensor]:
        """Return the same for the transposed matrix, and the values in its order."""
        sorted_columns, order = self.columns.sort(stable=True)
        begins = torch.arange(columns + 1, dtype=torch.int32, device=order.device)
        bounds = torch.searchsorted(sorted_columns, begins, out_int32=True)
        order = order.int()
        rows = self.rows().index_select(0, order)
        return RowBounds(rows, bounds), values.index_select(0, order)


class KeptProduct(torch.autograd.Function):
    """inputs @ W.T for a sparse W, and back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, positions: Tensor, rows: int) -> Tensor:
        """Multiply.

        Args:
            ctx: Of this call.
            inputs: Shape (..., columns).
            values: The kept ones, shape (kept,), dtype of `inputs`.
            positions: Sorted flat int64 indices into W, shape (kept,).
            rows: Of W.

        Returns:
            Shape (..., rows).
        """
        ctx.save_for_backward(inputs, values)
        ctx.positions, ctx.rows = positions, rows
        return multiply(inputs, values, RowBounds.of(positions, rows, inputs.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs and values."""
        inputs, values = ctx.saved_tensors
        columns = inputs.shape[-1]
        x, g = inputs.reshape(-1, columns), grads[0].reshape(-1, ctx.rows)
        of_inputs, of_values = None, None
        if torch.is_grad_enabled():
            # Derivatives of the gradients go through the dense weight.
            weight = values.new_zeros(ctx.rows * columns).index_copy(0, ctx.positions, values)
            of_inputs = (g @ weight.view(-1, columns)).view(inputs.shape)
            of_values = (g.T @ x).reshape(-1)[ctx.positions]
            return of_inputs, of_values, None, None
        kept, g = RowBounds.of(ctx.positions, ctx.rows, columns), _samples_last(g)
        if ctx.needs_input_grad[1]:
            of_values = _dot_products(kept, g, _samples_last(x))
        if ctx.needs_input_grad[0]:
            of_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
            _sum(*kept.transposed(values, columns), g, of_inputs)
        return of_inputs, of_values, None, None


def multiply(inputs: Tensor, values: Tensor, kept: RowBounds) -> Tensor:
    """Compute inputs @ W.T.

    Args:
        inputs: Shape (..., columns).
        values: The kept ones of W, shape (kept,), dtype of `inputs`.
        kept: Where they lie.

    Returns:
        Shape (..., rows).
    """
    out = inputs.new_empty(*inputs.shape[:-1], len(kept.bounds) - 1)
    _sum(kept, values, _samples_last(inputs.reshape(-1, inputs.shape[-1])), out)
    return out


def _samples_last(x: Tensor) -> Tensor:
    """Return x.T, contiguous, with samples of zeros behind that kernels need."""
    samples = -(-len(x) // _SAMPLES) * _SAMPLES
    padded = x.new_zeros(x.shape[1], samples)
    padded[:, : len(x)] = x.T
    return padded


def _sum(kept: RowBounds, values: Tensor, x: Tensor, out: Tensor) -> None:
    """Write W x, x of shape (columns, samples), to `out`, which has samples first."""
    found = F.embedding_bag(
        kept.columns,
        x,
        kept.bounds,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )
    out = out.view(-1, len(found))
    out.copy_(found[:, : len(out)].T)


def _dot_products(kept: RowBounds, g: Tensor, x: Tensor) -> Tensor:
    """Return, for each kept value, the product of a row of g and a row of x, both samples last."""
    _silence_beta()
    size = len(g), len(x)
    nothing = g.new_zeros(len(kept.columns))
    matrix = torch.sparse_csr_tensor(
        kept.bounds, kept.columns, nothing, size, check_invariants=False
    )
    return torch.sparse.sampled_addmm(matrix, g, x.T, beta=0.0).values()


@cache
def _silence_beta() -> None:
    """Let PyTorch say that such tensors are in beta, which it does once, to nobody."""
    with catch_warnings():
        simplefilter("ignore")
        bounds, columns = torch.tensor([0, 1]), torch.tensor([0])
        torch.sparse_csr_tensor(bounds, columns, torch.ones(1), (1, 1), check_invariants=False)
