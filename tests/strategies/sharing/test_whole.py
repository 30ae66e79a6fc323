"""All weights at once are the weights one by one, and so are their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.strategies.sharing.gradient_scale import slot_factors
from memfold.strategies.sharing.hashednet import ElementMapping
from memfold.strategies.sharing.random_fold import RandomFold
from memfold.strategies.sharing.roast import TileMapping
from strategies.sharing.spans import make_spans

shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 12)),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=4,
)


def mapping_of(kind, spans, num_slots, sign):
    options = {"seed": 3, "sign": sign}
    if kind == "tiles":
        return TileMapping(spans, max(6, num_slots), tile=(2, 3), **options)
    if kind == "elements":
        return ElementMapping(spans, max(len(spans), num_slots), **options)
    return RandomFold(spans, num_slots, align_rows=kind == "aligned", **options)


@given(
    shapes=shapes,
    kind=st.sampled_from(["fold", "aligned", "tiles", "elements"]),
    sign=st.sampled_from(["column", "run", "weight"]),
    ratio=st.floats(0.01, 1),
    gone=st.integers(0, 3),
    padding=st.booleans(),
)
def test_whole_reads_and_folds_as_tensor_by_tensor(shapes, kind, sign, ratio, gone, padding):
    spans = make_spans(shapes)
    num_slots = max(1, round(ratio * spans[-1].stop))
    mapping = mapping_of(kind, spans, num_slots, sign)
    scales = [0.5 + index for index in range(len(spans))]
    rows = [0 if padding and index == 0 else None for index in range(len(spans))]
    factors = slot_factors(mapping, scales, None, "length", torch.float64)
    whole = mapping.whole(scales, rows, factors)
    tables = whole.tables()
    slots = torch.randn(mapping.num_slots, dtype=torch.float64)
    torch.testing.assert_close(whole.scale(slots, factors[0]), mapping.scale(slots, factors[0]))

    gradients = [torch.randn(span.shape, dtype=torch.float64) for span in spans]
    gradients[0] = gradients[0].transpose(0, 1).contiguous().transpose(0, 1)
    weights = whole.read(slots, tables)
    expected = torch.zeros_like(slots)
    for index, (span, scale, row) in enumerate(zip(spans, scales, rows, strict=True)):
        weight = mapping.gather(slots, span, scale).view(span.shape)
        if row is not None:
            weight[row] = 0
        torch.testing.assert_close(weights[index], weight)
        if index != gone:
            mapping.add_weight(gradients[index], span, scale, expected, row)
    given = [None if index == gone else g for index, g in enumerate(gradients)]
    kept = [gradient.clone() for gradient in gradients]
    torch.testing.assert_close(whole.fold(given, tables), expected)
    torch.testing.assert_close(gradients, kept)


@pytest.mark.parametrize(
    ("width", "options", "way"),
    [
        (1000, {}, "whole"),
        (1100, {}, "lean"),
        (1100, {"autograd": "whole"}, "whole"),
        (1000, {"autograd": "lean"}, "lean"),
        (1000, {"linear": "weight"}, "whole"),
        (1000, {"linear": "windows"}, "lean"),
    ],
)
def test_small_models_are_built_whole(width, options, way):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(width, 1000))
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    memfold.compress(model, "stable_rps", ratio=0.01, **options)
    assert compression_of(model).autograd == way


@pytest.mark.parametrize("autograd", ["whole", "classic"])
def test_products_without_weights_have_no_weights_to_build(autograd):
    with pytest.raises(memfold.InputError, match=f"builds no weight.*{autograd}.*choose one"):
        memfold.compress(nn.Linear(9, 9), "stable_rps", linear="windows", autograd=autograd)


def test_what_is_kept_is_one_number_per_partition_and_signs_of_rows_and_columns():
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 10))
    memfold.compress(model, "stable_rps", ratio=0.01)
    compression = compression_of(model)
    before = compression.resident_bytes
    model(torch.randn(3, 40)).sum().backward()
    partitions, segments = 100, len(compression.slot_factors(torch.device("cpu"), torch.float32)[0])
    assert compression.resident_bytes - before == 4 * partitions + 4 * segments + 40 + 50 + 50 + 10


@pytest.mark.parametrize("strategy", ["stable_rps", "hashednet", "roast"])
def test_a_change_of_dtype_and_new_scales_are_seen(strategy):
    torch.manual_seed(0)
    options = {"tile_rows": 2, "tile_columns": 3} if strategy == "roast" else {}
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    memfold.compress(model, strategy, ratio=0.3, autograd="whole", **options)
    x = torch.randn(5, 12)
    model(x)
    model.double()
    torch.testing.assert_close(model(x.double()), memfold.densify(model)(x.double()))
    state = model.state_dict()
    state["shared_scales"] = state["shared_scales"] * 2
    model.load_state_dict(state)
    torch.testing.assert_close(model(x.double()), memfold.densify(model)(x.double()))
