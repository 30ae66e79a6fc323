"""Positions of kept entries: sizes by formula, layouts by naive loops, damage refused."""

from math import ceil, log2, prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.pruning.encoding import FORMATS, cheapest, decode, encode

shapes = st.lists(st.integers(1, 12), max_size=3).map(tuple)
# Formats of real size: (kept, shape) that make each one the cheapest.
CASES = {
    "none": (0, (7, 9)),
    "all": (63, (7, 9)),
    "bitmask": (20, (7, 9)),
    "indices": (3, (70, 9)),
    "csr": (30, (4, 90)),
}


def draw(kept, shape, seed=0):
    order = torch.randperm(prod(shape), generator=torch.Generator().manual_seed(seed))
    return order[:kept].sort().values


def write(numbers, width):
    """Numbers as a string of bits, the lowest bit of each first."""
    return "".join(str(number >> bit & 1) for number in numbers for bit in range(width))


def naive(name, positions, shape):
    """Bytes of a format, written one bit at a time."""
    numel = prod(shape)
    rows = shape[0] if shape else 1
    cols = numel // rows
    positions = positions.tolist()
    if name in ("none", "all"):
        bits = ""
    elif name == "bitmask":
        bits = write([int(i in positions) for i in range(numel)], 1)
    elif name == "indices":
        bits = write(positions, ceil(log2(numel)))
    else:
        counts = [sum(p // cols == row for p in positions) for row in range(rows)]
        bits = write(counts, ceil(log2(cols + 1)))
        bits += write([p % cols for p in positions], ceil(log2(cols)))
    return [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]


@st.composite
def kept_and_shape(draw_from):
    shape = draw_from(st.one_of(shapes, st.tuples(st.integers(1, 4), st.integers(1, 300))))
    numel = prod(shape)
    kept = draw_from(st.one_of(st.integers(0, numel), st.integers(0, max(1, numel // 9))))
    return min(kept, numel), shape


@given(kept_and_shape(), st.integers(0, 99))
def test_round_trip_in_the_bytes_of_the_naive_loop(case, seed) -> None:
    kept, shape = case
    positions = draw(kept, shape, seed)
    name, num_bytes = cheapest(kept, shape)
    data = encode(positions, shape)
    assert data.dtype == torch.uint8
    assert data.shape == (num_bytes,)
    assert data.tolist() == naive(name, positions, shape)
    read = decode(data, kept, shape)
    assert read.dtype == torch.int64
    assert torch.equal(read, positions)


@given(kept_and_shape())
def test_the_format_is_the_smallest_of_all(case) -> None:
    kept, shape = case
    positions = draw(kept, shape)
    legal = FORMATS[2:]
    if kept == 0:
        legal = ("none", *legal)
    if kept == prod(shape):
        legal = ("all", *legal)
    sizes = {name: len(naive(name, positions, shape)) for name in legal}
    name, num_bytes = cheapest(kept, shape)
    assert num_bytes == min(sizes.values())
    if 0 < kept < prod(shape):
        assert name == min(sizes, key=lambda name: (sizes[name], FORMATS.index(name)))
    else:
        assert name == ("all" if kept else "none")


@pytest.mark.parametrize(("name", "case"), CASES.items())
def test_each_format_is_chosen_somewhere(name: str, case) -> None:
    kept, shape = case
    assert cheapest(kept, shape)[0] == name
    positions = draw(kept, shape)
    assert torch.equal(decode(encode(positions, shape), kept, shape), positions)


def test_every_subset_of_a_small_tensor() -> None:
    for shape in [(), (1,), (1, 1), (5,), (1, 5), (5, 1), (2, 3), (2, 1, 3)]:
        numel = prod(shape)
        for subset in range(2**numel):
            positions = torch.tensor([i for i in range(numel) if subset >> i & 1]).long()
            data = encode(positions, shape)
            assert torch.equal(decode(data, len(positions), shape), positions)
            assert len(data) <= 1


def test_empty_tensor() -> None:
    assert cheapest(0, (0, 3)) == ("none", 0)
    assert decode(encode(torch.empty(0).long(), (0, 3)), 0, (0, 3)).shape == (0,)


@pytest.mark.parametrize("numel", [2, 100, 128, 129, 1000, 2**16, 10**6 + 1])
def test_indices_break_even_with_the_bitmask_at_one_over_log2(numel: int) -> None:
    # A single column leaves only these two.
    width = ceil(log2(numel))
    for kept in range(max(1, numel // width - 20), min(numel, numel // width + 20)):
        name, num_bytes = cheapest(kept, (numel,))
        bitmask, indices = ceil(numel / 8), ceil(kept * width / 8)
        assert (name, num_bytes) == min(("bitmask", bitmask), ("indices", indices), key=_size)
        if kept / numel >= 1 / width:
            assert name == "bitmask"
        if kept / numel < 1 / width - 8 / (width * numel):
            assert name == "indices"


def _size(pair):
    return pair[1]


def test_csr_bytes_by_hand() -> None:
    # 64 rows of 1024: 11 bits per count, 10 per column; indices take 16, a bitmask 8192 bytes.
    assert cheapest(1000, (64, 1024)) == ("csr", (64 * 11 + 1000 * 10) // 8)
    assert cheapest(1000, (64, 256, 2, 2)) == ("csr", (64 * 11 + 1000 * 10) // 8)
    assert cheapest(100, (64, 1024)) == ("indices", 200)


def test_ten_million_weights() -> None:
    for kept, shape in [(700_000, (2500, 4000)), (300_000, (10_000_000,)), (3_000_000, (10**7,))]:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(shape, generator=generator).flatten() < kept / prod(shape)
        positions = mask.nonzero().flatten()
        data = encode(positions, shape)
        assert torch.equal(decode(data, len(positions), shape), positions)


@given(kept_and_shape(), st.data())
def test_a_changed_bit_is_refused_or_another_pattern(case, data_from) -> None:
    kept, shape = case
    data = encode(draw(kept, shape), shape)
    assume(len(data) > 0)
    bit = data_from.draw(st.integers(0, 8 * len(data) - 1))
    damaged = data.clone()
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        positions = decode(damaged, kept, shape)
    except InputError:
        return
    # What is accepted is a pattern that would have been written like this.
    assert torch.equal(encode(positions, shape), damaged)


@pytest.mark.parametrize(("name", "case"), CASES.items())
def test_wrong_length_or_dtype_is_refused(name: str, case) -> None:
    kept, shape = case
    data = encode(draw(kept, shape), shape)
    wrong = [torch.cat([data, data.new_zeros(1)]), data.to(torch.int8), data[None]]
    if len(data):
        wrong.append(data[:-1])
    for other in wrong:
        with pytest.raises(InputError, match=rf"must be {len(data)} bytes \({name}\)"):
            decode(other, kept, shape)


@pytest.mark.parametrize("kept", [-1, 64])
def test_counts_beyond_the_tensor_are_refused(kept: int) -> None:
    with pytest.raises(InputError, match=f"^{kept} kept entries do not fit a tensor of 63"):
        cheapest(kept, (7, 9))
    with pytest.raises(InputError, match="do not fit"):
        decode(torch.zeros(8, dtype=torch.uint8), kept, (7, 9))


def _as_bytes(bits: str) -> torch.Tensor:
    numbers = [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "kept", "shape"),
    [
        ("1" * 21 + "0" * 42, 20, (7, 9)),  # popcount
        ("1" * 20 + "0" * 43 + "1", 20, (7, 9)),  # a bit after the last entry
        (write([5, 5, 9], 10), 3, (70, 9)),  # repeated
        (write([9, 5, 7], 10), 3, (70, 9)),  # not increasing
        (write([5, 7, 630], 10), 3, (70, 9)),  # out of range
        (write([5, 7, 9], 10) + "01", 3, (70, 9)),  # a bit after the last number
        (write([10, 10, 10, 1], 7) + write(range(30), 7), 30, (4, 90)),  # counts: 31
        (write([30, 0, 0, 0], 7) + write([*range(29), 90], 7), 30, (4, 90)),  # column 90
        (write([30, 0, 0, 0], 7) + write([*range(29), 3], 7), 30, (4, 90)),  # column again
        (write([91, 0, 0, 0], 7) + write(range(30), 7), 30, (4, 90)),  # more than a row
    ],
)
def test_damage_by_hand_is_refused(bits: str, kept: int, shape) -> None:
    with pytest.raises(InputError, match=r"are damaged|must be increasing"):
        decode(_as_bytes(bits), kept, shape)


@pytest.mark.parametrize("positions", [[3, 2], [2, 2], [-1, 2], [2, 63]])
def test_bad_positions_are_not_written(positions: list[int]) -> None:
    with pytest.raises(InputError, match="must be increasing and within a tensor of 63"):
        encode(torch.tensor(positions), (7, 9))
