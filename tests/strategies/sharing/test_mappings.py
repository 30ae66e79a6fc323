"""Slots, signs and loads against loops over single weights."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfold.strategies.sharing.hashednet import ElementMapping
from memfold.strategies.sharing.hashing import RangeHash
from memfold.strategies.sharing.random_fold import RandomFold
from memfold.strategies.sharing.roast import TileMapping
from reference.sharing import aligned_fold_slots, explicit_map, random_fold_slots, tile_slots
from strategies.sharing.spans import make_spans


def loads_of(mapping):
    ones = torch.ones(mapping.num_slots, dtype=torch.float64)
    return mapping.scale(ones, mapping.accumulate([1.0] * len(mapping.spans)))


shapes_lists = st.lists(
    st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple), min_size=1, max_size=4
)


def make_mapping(kind, shapes, fraction, seed):
    spans = make_spans(shapes)
    n = spans[-1].stop
    kind, sign = kind.split("-")
    if kind == "element":
        return ElementMapping(spans, max(len(spans), round(fraction * n)), seed=seed, sign=sign)
    if kind == "tile":
        m = max(6, round(fraction * n))
        return TileMapping(spans, m, seed=seed, sign=sign, tile=(2, 3))
    m = max(1, round(fraction * n))
    return RandomFold(spans, m, seed=seed, sign=sign, align_rows=kind == "aligned")


KINDS = (
    "fold-column",
    "fold-run",
    "fold-weight",
    "aligned-column",
    "aligned-run",
    "aligned-weight",
    "tile-column",
    "tile-run",
    "tile-weight",
    "element-column",
    "element-weight",
)
cases = st.tuples(st.sampled_from(KINDS), shapes_lists, st.floats(0.01, 1), st.integers(0, 99))


@given(cases)
def test_every_weight_has_one_slot_and_one_sign(case):
    mapping = make_mapping(*case)
    matrix = explicit_map(mapping)
    assert torch.equal(matrix.abs().sum(1), torch.ones(mapping.num_weights, dtype=torch.float64))
    assert set(matrix.unique().tolist()) <= {-1.0, 0.0, 1.0}


@given(cases, st.floats(0.25, 4))
def test_scatter_is_the_adjoint_of_gather_and_accumulate_counts(case, factor):
    mapping = make_mapping(*case)
    matrix = explicit_map(mapping)
    constants = [float(3**i) for i in range(len(mapping.spans))]
    expected = torch.zeros(mapping.num_slots, dtype=torch.float64)
    for span, constant in zip(mapping.spans, constants, strict=True):
        rows = matrix[span.start : span.stop]
        weights = torch.linspace(-1, 2, span.numel, dtype=torch.float64)
        out = torch.ones(mapping.num_slots, dtype=torch.float64)
        mapping.scatter(weights, span, factor, out)
        torch.testing.assert_close(out, 1 + factor * rows.T @ weights)
        slots = torch.linspace(1, 2, mapping.num_slots, dtype=torch.float64)
        torch.testing.assert_close(mapping.gather(slots, span, factor), factor * rows @ slots)
        expected += constant * rows.abs().sum(0)
    ones = torch.ones(mapping.num_slots, dtype=torch.float64)
    found = mapping.scale(ones, mapping.accumulate(constants))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(shapes_lists, st.integers(1, 300), st.integers(0, 99))
def test_random_fold_loads_differ_by_at_most_one(shapes, num_slots, seed):
    spans = make_spans(shapes)
    n = spans[-1].stop
    num_slots = min(num_slots, n)
    mapping = RandomFold(spans, num_slots, seed=seed, sign="run")
    loads = loads_of(mapping)
    assert set(loads.tolist()) <= {float(n // num_slots), float(-(-n // num_slots))}
    assert loads.sum() == n


@given(st.integers(1, 10**7), st.integers(1, 10**4), st.integers(0, 99))
@settings(max_examples=50)
def test_random_fold_loads_of_large_models(n, num_slots, seed):
    num_slots = min(n, num_slots)
    cut = max(1, n // 3)
    shapes = [(1, cut), (1, n - cut)] if n > cut else [(1, n)]
    mapping = RandomFold(make_spans(shapes), num_slots, seed=seed, sign="run")
    loads = loads_of(mapping)
    assert set(loads.tolist()) <= {float(n // num_slots), float(-(-n // num_slots))}


@given(
    shapes_lists,
    st.floats(0.01, 1),
    st.integers(0, 99),
    st.sampled_from(["column", "run", "weight"]),
)
def test_random_fold_slots_follow_the_paper(shapes, fraction, seed, sign):
    mapping = make_mapping(f"fold-{sign}", shapes, fraction, seed)
    slots = explicit_map(mapping).abs().argmax(1).tolist()
    assert slots == random_fold_slots(mapping.num_weights, mapping.num_slots, seed)


@given(
    shapes_lists,
    st.floats(0.01, 1),
    st.integers(0, 99),
    st.sampled_from(["column", "run", "weight"]),
)
def test_aligned_partitions_end_at_rows(shapes, fraction, seed, sign):
    mapping = make_mapping(f"aligned-{sign}", shapes, fraction, seed)
    slots = explicit_map(mapping).abs().argmax(1).tolist()
    assert slots == aligned_fold_slots(shapes, mapping.num_slots, seed)
    loads = torch.tensor(slots).bincount(minlength=mapping.num_slots).double()
    spread = loads.std(correction=0) / loads.mean()
    assert mapping.unevenness == pytest.approx(float(spread), abs=1e-12)


@given(shapes_lists, st.floats(0.01, 1), st.integers(0, 99), st.booleans())
def test_windows_describe_every_weight(shapes, fraction, seed, aligned):
    mapping = make_mapping("aligned-run" if aligned else "fold-run", shapes, fraction, seed)
    slots = torch.arange(1.0, mapping.num_slots + 1, dtype=torch.float64)
    for span in mapping.spans:
        windows, found = mapping.windows(span), []
        assert windows.offsets.tolist() == [0, *windows.lengths.cumsum()[:-1]]
        for length, start, sign in zip(windows.lengths, windows.starts, windows.signs, strict=True):
            places = (start + torch.arange(length)) % mapping.num_slots
            found.append(sign * slots[places])
        assert torch.equal(torch.cat(found), mapping.gather(slots, span, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sign", ["column", "run", "weight"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("num_slots", [1, 30, 700, 1024, 1500, 5000, 40000])
def test_random_fold_all_ways_to_read_and_to_add_agree(num_slots, aligned, sign, dtype):
    # Few windows are added one by one, many as rows of a table, many short ones by their start.
    shapes = [(4, 9), (40, 300), (3, 5, 20)]
    spans = make_spans(shapes)
    mapping = RandomFold(spans, num_slots, seed=3, sign=sign, align_rows=aligned)
    if aligned:
        slots = aligned_fold_slots(shapes, num_slots, 3)
    else:
        slots = random_fold_slots(spans[-1].stop, num_slots, 3)
    slots = torch.tensor(slots)[spans[1].start : spans[1].stop]
    values = torch.randn(num_slots, dtype=torch.float64)
    signs = mapping.gather(torch.ones_like(values), spans[1], 1.0)
    assert set(signs.tolist()) <= {-1.0, 1.0}
    read = mapping.gather(values, spans[1], 0.5, dtype)
    assert read.dtype == dtype
    torch.testing.assert_close(read, (0.5 * signs * values[slots]).to(dtype))
    weights = torch.randn(12000, dtype=torch.float64).to(dtype)
    before, out = weights.clone(), torch.ones(num_slots, dtype=torch.float64)
    mapping.scatter(weights, spans[1], 0.5, out)
    assert torch.equal(weights, before)
    expected = torch.ones(num_slots, dtype=torch.float64)
    expected.index_add_(0, slots, 0.5 * signs * weights.double())
    torch.testing.assert_close(out, expected)


def test_signs_of_weights_are_hashed_one_by_one():
    spans = make_spans([(3, 7), (5000, 3)])
    mapping = RandomFold(spans, 40, seed=3, sign="weight")
    hashed = RangeHash(3, "weight-sign")(0, spans[-1].stop, torch.device("cpu"))
    for span in spans:
        found = torch.ones(span.numel)
        mapping.signs(span).multiply_(found)
        expected = (1 - 2 * (hashed >> 30))[span.start : span.stop]
        assert torch.equal(found, expected.float())
        assert torch.equal(mapping.signs(span).expand(5, 17), expected[5:17].to(torch.int8))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_tiles_are_contiguous_chunks(rows, columns, seed):
    spans = make_spans([(rows, columns)])
    mapping = TileMapping(spans, 40, seed=seed, sign="run", tile=(2, 3))
    starts, _ = mapping._tiles(spans[0], torch.device("cpu"))
    assert int(starts.min()) >= 0
    assert int(starts.max()) <= 40 - 6
    slots = explicit_map(mapping).abs().argmax(1).tolist()
    assert slots == tile_slots(rows, columns, (2, 3), starts.tolist())


def test_hashednet_layers_use_their_own_segment():
    spans = make_spans([(20, 30), (40, 10)])
    mapping = ElementMapping(spans, 100, seed=2, sign="run")
    slots = explicit_map(mapping).abs().argmax(1)
    assert set(slots[:600].tolist()) == set(range(60))
    assert set(slots[600:].tolist()) == set(range(60, 100))


PRINT_WEIGHTS = """
import hashlib, torch, memfold
from memfold.compression import compression_of
torch.manual_seed(0)
for name, options in {strategies!r}.items():
    net = torch.nn.Sequential(torch.nn.Linear(17, 23), torch.nn.Linear(23, 5)).double()
    memfold.compress(net, name, ratio=0.3, seed=11, **options)
    mapping = compression_of(net).mapping
    slots = torch.arange(1, mapping.num_slots + 1, dtype=torch.float64)
    for span in mapping.spans:
        print(hashlib.sha256(mapping.gather(slots, span, 1.0).numpy().tobytes()).hexdigest())
"""


def test_the_same_seed_gives_the_same_mapping_in_a_new_process():
    options = {
        "stable_rps": {},
        "roast": {"tile_rows": 2, "tile_columns": 3},
        "hashednet": {},
    }
    prints = [
        subprocess.run(
            [sys.executable, "-c", PRINT_WEIGHTS.format(strategies=options)],
            env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0].split())) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_mapping_is_the_same_in_another_dtype(kind):
    mapping = make_mapping(kind, [(5, 7), (3, 4, 2)], 0.3, 4)
    for span in mapping.spans:
        exact = mapping.gather(torch.arange(1.0, mapping.num_slots + 1).double(), span, 1.0)
        for dtype in (torch.float32, torch.float16):
            slots = torch.arange(1, mapping.num_slots + 1, dtype=dtype)
            assert torch.equal(mapping.gather(slots, span, 1.0).double(), exact)
