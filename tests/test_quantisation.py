"""Values in fewer bits, against a naive loop over blocks and by exhaustion of 16-bit floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold import quantisation
from memfold.errors import InputError
from memfold.quantisation import BITS, BLOCK_SIZES, Packing

BLOCK = Packing().block_size

LIMITS = {8: 127, 7: 63, 6: 31, 5: 15, 4: 7, 3: 3}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FEW_BITS = (8, 7, 6, 5, 4, 3)
CUTS = {
    5: (1, 0.975, 0.95, 0.925, 0.9),
    4: (1, 0.95, 0.9, 0.85, 0.8),
    3: (1, 0.9, 0.8, 0.7, 0.6),
}

shapes = st.lists(st.integers(0, 9), max_size=4)
bits_choices = st.sampled_from(BITS)
dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(BLOCK_SIZES)
few_bits = pytest.mark.parametrize("bits", FEW_BITS)


def quantise(values, bits, **options):
    return quantisation.quantise(values, Packing(bits, **options))


def dequantise(parts, shape, bits, dtype, **options):
    return quantisation.dequantise(parts, shape, Packing(bits, **options), dtype)


def rounded(values, bits, **options):
    return quantisation.rounded(values, Packing(bits, **options))


def packed_bytes(numel, bits, dtype, **options):
    parts = quantisation.packed_like([numel], Packing(bits, **options), dtype)
    return sum(part.nbytes for part in parts.values())


def make_values(shape, dtype, *, seed=0, exponent=0):
    """Normal values, each block of 7 on another scale around 10**exponent."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    scales = torch.arange(values.numel()).div(7, rounding_mode="floor") % 5
    return (values * 2.0 ** scales.reshape(shape) * 10.0**exponent).to(dtype)


def naive(values, bits, size=BLOCK):
    """Integers and scales of a flat list, one block after the other."""
    limit = LIMITS[bits]
    integers, scales = [], []
    for start in range(0, len(values), size):
        block = values[start : start + size]
        tries = []
        for cut in CUTS.get(bits, (1,)):
            scale = torch.tensor(cut * max(abs(v) for v in block) / limit, dtype=torch.float64)
            scale = max(float(scale.to(torch.bfloat16)), 2.0**-126)
            codes = [max(-limit, min(limit, round(v / scale))) for v in block]
            error = sum((v - q * scale) ** 2 for v, q in zip(block, codes, strict=True))
            tries.append((error, codes, scale))
        _, codes, scale = min(tries, key=lambda tried: tried[0])
        integers += codes
        scales.append(scale)
    return integers, scales


def codes_of(parts, bits, numel):
    """Stored integers, decoded by hand."""
    if bits == 8:
        return parts[""].flatten().tolist()
    stream = "".join(f"{byte:08b}"[::-1] for byte in parts[""].tolist())
    codes = [int(stream[start : start + bits][::-1], 2) for start in range(0, numel * bits, bits)]
    return [code - 2**bits if code > LIMITS[bits] else code for code in codes]


@pytest.mark.parametrize("bits", BITS)
def test_choices_are_taken(bits: int) -> None:
    Packing(bits)


@pytest.mark.parametrize("bits", [0, 2, 64, 8.0, True, "8", None, [8], torch.tensor(8)])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(
        InputError, match=r"^artifact\.bits must be one of 32, 16, 8, 7, 6, 5, 4, 3, got "
    ):
        Packing(bits)


@pytest.mark.parametrize("size", [0, 8, 63, 512, 64.0, True, "64", None])
def test_other_block_sizes_are_refused(size: object) -> None:
    with pytest.raises(
        InputError, match=r"^artifact\.block_size must be one of 16, 32, 64, 128, 256, got "
    ):
        Packing(8, size)


@pytest.mark.parametrize("bits", [5, 4, 3])
def test_smaller_blocks_have_smaller_errors(bits: int) -> None:
    values = torch.randn(100 * max(BLOCK_SIZES), generator=torch.Generator().manual_seed(0))
    errors = [
        float((rounded(values, bits, block_size=size) - values).square().sum())
        for size in BLOCK_SIZES
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[BLOCK_SIZES.index(BLOCK)]


@pytest.mark.parametrize(
    ("numel", "bits", "itemsize", "expected"),
    [
        (100, 32, 4, 400),
        (100, 32, 8, 800),
        (100, 16, 4, 200),
        (100, 16, 2, 200),
        (0, 8, 4, 0),
        (1, 8, 4, 3),
        (64, 8, 4, 66),
        (65, 8, 8, 69),
        (1, 4, 4, 3),
        (64, 4, 4, 34),
        (67, 4, 2, 38),
        (1, 3, 4, 3),
        (64, 3, 4, 26),
        (67, 5, 4, 46),
    ],
)
def test_packed_bytes_by_hand(numel: int, bits: int, itemsize: int, expected: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    assert packed_bytes(numel, bits, dtype) == expected


@given(shapes, bits_choices, dtypes, block_sizes)
def test_the_parts_are_known_before_the_values(shape, bits, dtype, size) -> None:
    values = make_values(shape, dtype)
    parts = quantise(values, bits, block_size=size)
    assert set(parts) == ({"", ".scales"} if bits in FEW_BITS else {""})
    assert all(part.is_contiguous() for part in parts.values())
    like = quantisation.packed_like(shape, Packing(bits, block_size=size), dtype)
    assert {n: (p.shape, p.dtype) for n, p in like.items()} == {
        n: (p.shape, p.dtype) for n, p in parts.items()
    }


@given(shapes, bits_choices, dtypes)
def test_round_trip(shape, bits, dtype) -> None:
    values = make_values(shape, dtype)
    parts = quantise(values, bits)
    read = dequantise(parts, values.shape, bits, dtype)
    assert read.shape == values.shape
    assert read.dtype == dtype
    if bits == 32 or (bits == 16 and values.itemsize == 2):
        assert torch.equal(read, values)
    elif bits == 16:
        assert torch.equal(read, values.half().to(dtype))
    again = quantise(read, bits)
    assert all(torch.equal(again[suffix], part) for suffix, part in parts.items())


@given(shapes, bits_choices, dtypes, st.integers(1, 50), block_sizes)
def test_coded_values_are_those_that_are_not(shape, bits, dtype, repeat, size) -> None:
    values = make_values(shape, dtype).flatten().repeat(repeat)
    plain, coded = (
        quantise(values, bits, block_size=size, coding=coding) for coding in ("none", "huffman")
    )
    assert {name.removesuffix(".coded") for name in coded} == set(plain)
    for name, part in coded.items():
        before = plain[name.removesuffix(".coded")]
        assert (
            part.nbytes <= before.nbytes - 32
            if name.endswith(".coded")
            else torch.equal(part, before)
        )
    read = [
        dequantise(parts, values.shape, bits, dtype, block_size=size) for parts in (plain, coded)
    ]
    assert torch.equal(*read)


@pytest.mark.parametrize(("bits", "part"), [(8, 0.96), (6, 0.94), (5, 0.93), (4, 0.91), (3, 0.87)])
def test_coding_saves_what_normal_values_allow(bits: int, part: float) -> None:
    values = torch.randn(300 * BLOCK, generator=torch.Generator().manual_seed(0))
    sizes = [
        sum(p.nbytes for p in quantise(values, bits, coding=coding).values())
        for coding in ("none", "huffman")
    ]
    assert sizes[0] == packed_bytes(values.numel(), bits, torch.float32)
    assert 0.97 * part < sizes[1] / sizes[0] < part


@given(shapes, bits_choices, dtypes, st.integers(-30, 30), block_sizes)
def test_rounded_values_are_those_of_the_round_trip(shape, bits, dtype, exponent, size) -> None:
    values = make_values(shape, torch.float64, exponent=exponent % 4 if bits == 16 else exponent)
    values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    parts = quantise(values, bits, block_size=size)
    read_as = torch.float32 if bits < 32 else dtype
    read = dequantise(parts, shape, bits, read_as, block_size=size)
    found = rounded(values, bits, block_size=size)
    assert found.dtype == dtype
    assert torch.equal(found, read.to(dtype))


@given(
    st.integers(0, 300),
    st.sampled_from(FEW_BITS),
    st.integers(-20, 20),
    st.integers(0, 99),
    block_sizes,
)
def test_codes_and_scales_equal_the_naive_loop(numel, bits, exponent, seed, size) -> None:
    values = make_values((numel,), torch.float64, seed=seed, exponent=exponent)
    parts = quantise(values, bits, block_size=size)
    integers, scales = naive(values.tolist(), bits, size)
    assert codes_of(parts, bits, numel) == integers
    assert parts[".scales"].tolist() == scales
    read = dequantise(parts, (numel,), bits, torch.float64, block_size=size).tolist()
    assert read == [q * scales[i // size] for i, q in enumerate(integers)]


@few_bits
@pytest.mark.parametrize("exponent", [-45, -40, -38, -37, -36, -20, 0, 20, 36])
def test_error_is_at_most_half_a_step(bits: int, exponent: int) -> None:
    values = make_values((1000,), torch.float32, exponent=exponent)
    parts = quantise(values, bits)
    steps = parts[".scales"].double().repeat_interleave(BLOCK)[:1000]
    read = dequantise(parts, (1000,), bits, torch.float32)
    error = (values.double() - read.double()).abs()
    is_cut = values.abs() > (LIMITS[bits] + 0.5) * steps
    assert (error <= 0.5 * (1 + 1e-5) * steps)[~is_cut].all()
    # At 3 bits values beyond about two standard deviations are cut off: 5 % of normal ones.
    assert is_cut.float().mean() <= (0 if bits > 5 else 0.1)
    again = quantise(read, bits)
    assert all(torch.equal(again[suffix], part) for suffix, part in parts.items())


@few_bits
def test_largest_value_of_a_block_uses_the_whole_range(bits: int) -> None:
    largest = torch.linspace(1, 4, 5000, dtype=torch.float32)
    values = torch.zeros(5000, BLOCK).index_fill_(1, torch.tensor(3), 1) * largest[:, None]
    codes = codes_of(quantise(values, bits), bits, values.numel())
    assert set(codes) == {0, LIMITS[bits]}


@few_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_is_quantised_to_the_same_bytes_again(
    bits: int, dtype: torch.dtype
) -> None:
    absmax = torch.arange(2**15, dtype=torch.int16).view(dtype)
    absmax = absmax[absmax.isfinite()]
    fractions = torch.linspace(-1, 1, BLOCK, dtype=torch.float64)
    values = (absmax.double()[:, None] * fractions).to(dtype)
    parts = quantise(values, bits)
    read = dequantise(parts, values.shape, bits, dtype)
    assert read.isfinite().all()
    again = quantise(read, bits)
    assert all(torch.equal(again[suffix], part) for suffix, part in parts.items())


@few_bits
@pytest.mark.parametrize("dtype", DTYPES[0:1] + DTYPES[2:])
def test_largest_float_stays_finite(bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, 0.5 * largest], dtype=dtype)
    read = dequantise(quantise(values, bits), (3,), bits, dtype)
    assert read.isfinite().all()
    assert torch.allclose(
        read.double(), values.double(), rtol=0, atol=0.51 * largest / LIMITS[bits]
    )


def test_saturates_in_a_narrower_dtype() -> None:
    parts = quantise(torch.tensor([1e6, -1e6]), 8)
    assert dequantise(parts, (2,), 8, torch.float16).tolist() == [65504.0, -65504.0]


@few_bits
def test_blocks_of_zeros(bits: int) -> None:
    values = torch.zeros(3, BLOCK)
    values[1, 5] = 1e-20
    parts = quantise(values, bits)
    assert parts[".scales"].tolist()[::2] == [2.0**-126] * 2
    read = dequantise(parts, values.shape, bits, torch.float32)
    assert torch.equal(read[::2], values[::2])
    assert read[1, 5] == pytest.approx(1e-20, rel=0.01)


@few_bits
def test_blocks_do_not_touch_each_other(bits: int) -> None:
    values = make_values((4, BLOCK), torch.float32)
    changed = values.clone()
    changed[2] *= 1e9
    read, read_changed = (
        dequantise(quantise(v, bits), v.shape, bits, torch.float32) for v in (values, changed)
    )
    assert torch.equal(read[[0, 1, 3]], read_changed[[0, 1, 3]])


@pytest.mark.parametrize("bits", BITS)
def test_values_are_read_row_by_row(bits: int) -> None:
    values = make_values((5, 40), torch.float32)
    transposed = values.T.contiguous().T
    parts, expected = quantise(transposed, bits), quantise(values, bits)
    assert all(torch.equal(parts[suffix], part) for suffix, part in expected.items())


@pytest.mark.parametrize("bits", [5, 4, 3])
def test_the_cut_lessens_the_error_of_normal_values(bits: int) -> None:
    values = torch.randn(100 * BLOCK, generator=torch.Generator().manual_seed(0))
    read = dequantise(quantise(values, bits), values.shape, bits, torch.float32)
    step = values.view(-1, BLOCK).abs().amax(dim=1, keepdim=True) / LIMITS[bits]
    plain = ((values.view(-1, BLOCK) / step).round() * step).flatten()
    errors = [(tensor - values).square().view(-1, BLOCK).sum(1) for tensor in (read, plain)]
    # The fewer the steps, the more a cut is worth: at 3 bits a quarter of the error at least.
    assert errors[0].sum() < {5: 1.0, 4: 0.95, 3: 0.75}[bits] * errors[1].sum()
    # Of a block, it is more where the scale is rounded alone.
    assert (errors[0] <= 1.05 * errors[1]).all()


def test_int4_layout_by_hand() -> None:
    parts = quantise(torch.tensor([7.0, -7.0, 2.0, -1.0, 3.0]), 4)
    assert parts[".scales"].tolist() == [1.0]
    assert parts[""].tolist() == [0x97, 0xF2, 0x03]


def test_parts_by_dtype_and_shape() -> None:
    assert quantise(torch.ones(3, 5), 16)[""].dtype == torch.float16
    large = torch.full((3, 5), 1e30, dtype=torch.bfloat16)
    assert torch.equal(quantise(large, 16)[""], large)
    assert quantise(large, 8)[""].shape == (3, 5)
    assert quantise(large, 4)[""].shape == (8,)
    assert quantise(large, 3)[""].shape == (6,)


def test_32_bits_take_values_as_they_are() -> None:
    values = torch.tensor([math.nan, math.inf, 1.0])
    assert quantise(values, 32)[""] is values


@pytest.mark.parametrize("bits", [16, 8, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(bits: int, value: float) -> None:
    with pytest.raises(InputError, match=rf"artifact\.bits={bits}: .*not finite"):
        quantise(torch.tensor([1.0, value]), bits)


def test_beyond_the_format_is_refused() -> None:
    assert quantise(torch.tensor([-65519.0]), 16)[""].item() == -65504
    with pytest.raises(
        InputError, match=r"bits=16 cannot hold a value of size 7e\+04; take 32, or 8"
    ):
        quantise(torch.tensor([1.0, -70000.0]), 16)
    for bits in FEW_BITS:
        with pytest.raises(InputError, match=r"cannot hold a value of size 1e\+300; take 32"):
            quantise(torch.tensor([1e300], dtype=torch.float64), bits)


@few_bits
def test_the_shape_of_the_scales_does_not_matter(bits: int) -> None:
    values = make_values((3, 70), torch.float32)
    parts = quantise(values, bits)
    expected = dequantise(parts, values.shape, bits, torch.float32)
    parts[".scales"] = parts[".scales"].view(-1, 1)
    assert torch.equal(dequantise(parts, values.shape, bits, torch.float32), expected)
