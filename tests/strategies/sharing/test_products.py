"""Products without a built weight against a weight built by loops."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.products import (
    Prepared,
    RowLayout,
    RowProducts,
    Windows,
    choose,
    correlation,
    costs,
    straddling,
    windows,
)
from memfold.strategies.sharing.products.products import METHODS
from memfold.strategies.sharing.random_fold import RandomFold

SCRIPT = Path(__file__).parents[3] / "scripts" / "measure_products.py"


def make_windows(lengths, starts, signs):
    lengths = np.array(lengths, dtype=np.int64)
    return Windows(
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        starts=np.array(starts, dtype=np.int64),
        signs=np.array(signs, dtype=np.int64),
    )


def dense(found, columns, slots, factor):
    flat = []
    for _, length, start, sign in zip(*(a.tolist() for a in vars(found).values()), strict=True):
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
    return make_windows(lengths, starts, signs), columns, m


def check(found, columns, m, batch, method, dtype=torch.float64, tolerance=1e-12, low=None):
    """Compare with float64; `tolerance` is relative to the largest entry."""
    generator = torch.Generator().manual_seed(m + columns)
    products = RowProducts(RowLayout.of(found, columns=columns, num_slots=m))
    slots = torch.randn(m, generator=generator, dtype=dtype)
    prepared, factor, low = Prepared(slots), 0.7, low or dtype
    exact = slots.double().clone().requires_grad_()
    weight = dense(found, columns, exact, factor)
    x = torch.randn(batch, columns, generator=generator, dtype=dtype).to(low)
    g = torch.randn(batch, len(weight), generator=generator, dtype=dtype).to(low)

    def close(actual, expected, dtype=low):
        assert actual.dtype == dtype
        expected = expected.detach()
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)

    y = x.double() @ weight.T
    close(products.product(prepared, x, factor, method), y)
    of_x = g.double() @ weight
    close(products.transposed_product(prepared, g, factor, method), of_x)
    (of_slots,) = torch.autograd.grad((y * g.double()).sum(), exact)
    for returns_x in (False, True):
        out = torch.zeros(2 * m, dtype=dtype)
        out[0] = 1
        if returns_x:
            close(products.backward(prepared, g, x, factor, out, method), of_x)
        else:
            products.add_gradient(prepared, g, x, factor, out, method)
        out[0] -= 1
        close(out[:m] + out[m:], of_slots, dtype)
    if not products.needs_doubled(method):
        out = torch.zeros(m, dtype=dtype)
        products.add_gradient(prepared, g, x, factor, out, method)
        close(out, of_slots, dtype)


@pytest.fixture(scope="module")
def small_pieces():
    """Let small tensors, too, take several pieces, and both kinds of windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "SCRATCH_NUMEL", 30)
        patch.setattr(costs, "_VIEW_ROWS", 2)
        patch.setattr(windows, "LONG_WINDOW", 8)
        patch.setattr(straddling, "SCRATCH_NUMEL", 24)
        patch.setattr(costs, "TRANSFORMED_NUMEL", 200)
        patch.setattr(correlation, "TRANSFORMED_NUMEL", 200)
        yield


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60)
@given(layout=layouts(), batch=st.integers(0, 5))
@example(layout=(make_windows([1] * 6, [0] * 6, [1, -1] * 3), 1, 1), batch=2)
@example(layout=(make_windows([12, 12], [3, 3], [1, -1]), 4, 12), batch=3)
@example(layout=(make_windows([5, 5, 2], [4, 0, 3], [1, -1, 1]), 12, 5), batch=1)
def test_products_are_those_of_the_built_weight(method, layout, batch):
    check(*layout, batch, method)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("align_rows", [False, True])
@pytest.mark.parametrize(
    ("dtype", "low", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 2e-6),
        # Half a unit in the last place of bfloat16 for each of the few sums of a part.
        (torch.float32, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("m", [97, 300, 2000])
def test_precision_of_random_folds(method, align_rows, dtype, low, tolerance, m):
    span = Span("weight", torch.Size((50, 64)), 0, 3200)
    found = RandomFold([span], m, seed=3, sign="run", align_rows=align_rows).windows(span)
    check(found, 64, m, 9, method, dtype, tolerance, low)


def test_layouts_tell_whole_from_straddling_rows():
    found = make_windows([10, 10, 4], [8, 1, 0], [1, -1, 1])
    layout = RowLayout.of(found, columns=4, num_slots=11)
    assert layout.straddling.tolist() == [2]
    assert layout.row_starts.tolist() == [8, 1, 0, 3, 7, 0]
    assert layout.row_signs.tolist() == [1, 1, 0, -1, -1, 1]
    assert [array.tolist() for array in vars(layout.pieces).values()] == [
        [0, 0],
        [0, 2],
        [2, 2],
        [5, 1],
        [1, -1],
    ]
    assert layout.unwrapped().straddling.tolist() == [0, 2]
    assert layout.nbytes == 8 * (4 * 3 + 4 * 3 + 1 + 5 * 2)


@pytest.mark.usefixtures("small_pieces")
def test_the_same_products_in_every_call():
    found = make_windows([64] * 8, [3, 3, 3, 9, 9, 70, 0, 1], [1, -1] * 4)
    products = RowProducts(RowLayout.of(found, columns=16, num_slots=90))
    generator = torch.Generator().manual_seed(0)
    prepared = Prepared(torch.randn(90, generator=generator))
    x, g = (torch.randn(40, size, generator=generator) for size in (16, 32))
    outs = torch.zeros(2, 180)
    for method in METHODS:
        results = [products.backward(prepared, g, x, 1.0, out, method) for out in outs]
        assert torch.equal(*results)
        assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fourier"}, "windows, correlation"),
        ({"x": torch.zeros(2, 5)}, r"x must have shape \(2, 4\)"),
        ({"prepared": Prepared(torch.zeros(13))}, r"slots must have shape \(12,\)"),
    ],
)
def test_refusals_of_products(arguments, message):
    products = RowProducts(RowLayout.of(make_windows([8], [0], [1]), columns=4, num_slots=12))
    usual = {"prepared": Prepared(torch.zeros(12)), "x": torch.zeros(2, 4), "method": "windows"}
    with pytest.raises(InputError, match=message):
        products.product(**{**usual, **arguments}, factor=1.0)


def test_refusals_of_gradients():
    products = RowProducts(RowLayout.of(make_windows([8], [0], [1]), columns=4, num_slots=12))
    prepared, out = Prepared(torch.zeros(12)), torch.zeros(12)
    with pytest.raises(InputError, match=r"out must have shape \(24,\)"):
        products.add_gradient(
            prepared, torch.zeros(1, 2), torch.zeros(1, 4), 1.0, out, "correlation"
        )


@pytest.mark.parametrize(
    ("lengths", "columns", "message"), [([7], 4, "rows of 4"), ([16], 4, "longer than m = 12")]
)
def test_refusals_of_layouts(lengths, columns, message):
    with pytest.raises(InputError, match=message):
        RowLayout.of(make_windows(lengths, [0], [1]), columns=columns, num_slots=12)


def fold_layout(rows, columns, ratio):
    span = Span("weight", torch.Size((rows, columns)), 0, rows * columns)
    num_slots = round(ratio * span.numel)
    mapping = RandomFold([span], num_slots, seed=0, sign="run", align_rows=True)
    return RowLayout.of(mapping.windows(span), columns=columns, num_slots=num_slots)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shape", "ratio", "batch", "expected"),
    [
        # Strong sharing of a large layer.
        ((4096, 4096), 0.0003, 128, {"correlation"}),
        ((4096, 4096), 0.001, 128, {"correlation"}),
        ((8192, 8192), 0.001, 1, {"correlation"}),
        # Transforms of far more slots than there are rows do not pay, nor does building.
        ((8192, 8192), 0.1, 128, {"windows"}),
        ((4096, 4096), 0.01, 1, {"windows", "correlation"}),
        # Building a small weight takes a few calls.
        ((64, 64), 0.5, 128, {"weight"}),
        ((256, 256), 0.1, 1, {"weight"}),
    ],
)
def test_choices_on_the_cpu(training, shape, ratio, batch, expected):
    layout = fold_layout(*shape, ratio)
    assert choose(layout, batch, training=training, device_type="cpu") in expected


@pytest.mark.parametrize(
    ("ratio", "batch", "once", "kept"),
    [(0.01, 128, "windows", "weight"), (0.001, 1, "correlation", "correlation")],
)
def test_a_weight_that_serves_many_batches_is_built_where_products_without_it_cost_more(
    ratio, batch, once, kept
):
    layout = fold_layout(8192, 8192, ratio)
    options = {"training": False, "device_type": "cpu"}
    assert choose(layout, batch, **options) == once
    assert choose(layout, batch, lasts=True, **options) == kept


def test_choices_where_nothing_was_measured():
    layout = fold_layout(1024, 1024, 0.001)
    assert choose(layout, 128, training=True, device_type="cuda") == "weight"


def test_a_layer_without_whole_rows_has_no_correlation():
    layout = RowLayout.of(make_windows([5] * 8, [0] * 8, [1] * 8), columns=10, num_slots=5)
    estimates = costs.estimate(layout, 4, training=True, costs=costs.SHIPPED_COSTS["cpu"])
    assert set(estimates) == {"weight", "windows"}


@pytest.mark.parametrize("ratio", [0.0003, 0.01, 1])
def test_estimates_grow_with_the_batch_and_with_training(ratio):
    layout, shipped = fold_layout(1024, 1024, ratio), costs.SHIPPED_COSTS["cpu"]
    before = dict.fromkeys(("weight", "windows", "correlation"), 0.0)
    for batch in (1, 2, 16, 128, 4096):
        estimates = costs.estimate(layout, batch, training=False, costs=shipped)
        trained = costs.estimate(layout, batch, training=True, costs=shipped)
        for choice, seconds in estimates.items():
            assert before[choice] < seconds < trained[choice]
            before[choice] = seconds


def test_costs_can_be_measured():
    measured = runpy.run_path(str(SCRIPT))["measure"]()
    assert all(value >= 0 for value in vars(measured).values())
    assert measured.multiply_add > 0
    layout = fold_layout(1024, 1024, 1)
    chosen = choose(layout, 128, training=True, device_type="cuda", costs=measured)
    assert chosen in ("weight", "windows")
