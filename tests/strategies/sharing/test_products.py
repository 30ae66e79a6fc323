"""Products without a built weight against a weight built by loops."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memfold.strategies.sharing.products import (
    METHODS,
    Prepared,
    RowLayout,
    RowProducts,
    correlation,
    straddling,
    windows,
)
from memfold.strategies.sharing.runs import Runs


def make_runs(lengths, starts, signs):
    lengths = np.array(lengths, dtype=np.int64)
    return Runs(
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        starts=np.array(starts, dtype=np.int64),
        signs=np.array(signs, dtype=np.int64),
    )


def dense(runs, columns, slots, factor):
    flat = []
    for _, length, start, sign in zip(*(a.tolist() for a in vars(runs).values()), strict=True):
        flat += [factor * sign * slots[(start + i) % len(slots)] for i in range(length)]
    return torch.stack(flat).view(-1, columns)


@st.composite
def layouts(draw):
    """Any lengths, or RANDOMFOLD's: equal lengths but for the first and the last."""
    columns, rows = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    m = draw(st.integers(1, 40))
    whole, lengths, rest = draw(st.integers(1, m)), [], rows * columns
    regular = draw(st.booleans())
    while rest:
        length = min(rest, whole if regular and lengths else draw(st.integers(1, m)))
        lengths.append(length)
        rest -= length
    count = len(lengths)
    starts = draw(st.lists(st.integers(0, m - 1), min_size=count, max_size=count))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=count, max_size=count))
    return make_runs(lengths, starts, signs), columns, m


def check(runs, columns, m, batch, method, dtype=torch.float64):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    generator = torch.Generator().manual_seed(m + columns)
    products = RowProducts(RowLayout.of(runs, columns=columns, num_slots=m))
    slots = torch.randn(m, generator=generator, dtype=dtype)
    prepared, factor = Prepared(slots), 0.7
    x = torch.randn(batch, columns, generator=generator, dtype=dtype)
    exact = slots.double().clone().requires_grad_()
    weight = dense(runs, columns, exact, factor)
    g = torch.randn(batch, len(weight), generator=generator, dtype=dtype)

    def close(actual, expected):
        assert actual.dtype == dtype
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(
            actual.double(), expected.detach(), rtol=0, atol=tolerance * max(scale, 1)
        )

    y = x.double() @ weight.T
    close(products.product(prepared, x, factor, method), y)
    of_x = g.double() @ weight
    close(products.transposed_product(prepared, g, factor, method), of_x)
    (of_slots,) = torch.autograd.grad((y * g.double()).sum(), exact)
    for returns_x in (False, True):
        out = torch.ones(2 * m, dtype=dtype)
        if returns_x:
            close(products.backward(prepared, g, x, factor, out, method), of_x)
        else:
            products.add_gradient(prepared, g, x, factor, out, method)
        close(out[:m] + out[m:] - 2, of_slots)


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Let small tensors, too, take several pieces, and both kinds of windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_SCRATCH_NUMEL", 30)
        patch.setattr(windows, "_VIEW_ROWS", 2)
        patch.setattr(windows, "_LONG_RUN", 8)
        patch.setattr(straddling, "_SCRATCH_NUMEL", 24)
        patch.setattr(correlation, "_PIECE_NUMEL", 200)
        yield


@pytest.mark.parametrize("method", METHODS)
@given(layout=layouts(), batch=st.integers(0, 5))
@example(layout=(make_runs([1] * 6, [0] * 6, [1, -1] * 3), 1, 1), batch=2)
@example(layout=(make_runs([12, 12], [3, 3], [1, -1]), 4, 12), batch=3)
@example(layout=(make_runs([5, 5, 2], [4, 0, 3], [1, -1, 1]), 12, 5), batch=1)
def test_products_are_those_of_the_built_weight(method, layout, batch):
    check(*layout, batch, method)
