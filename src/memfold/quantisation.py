"""Values in fewer bits: what an artifact holds in place of a tensor of floats.

32 bits keep the values as they are, 16 bits round them to float16 (below 3e-8 to zero; beyond its
range is refused, so nothing becomes infinite). 8 to 3 bits are block-wise and symmetric: the
flattened values are cut into blocks, of 64 if nothing is said, and a value x of a block with the
scale s is stored as the integer q = round(x / s), at b bits in -L..L for L = 2**(b - 1) - 1, and
read back as q s.

s is c absmax / L, rounded to the nearest bfloat16, 2 bytes per block. c is 1; from 5 bits down, it
is the one of 1, 1 - d, ..., 1 - 4 d with d = 0.8 / 2**b that has the least sum of squared errors in
the block: the few values beyond L s are cut off, and all the others get finer steps. Rounding moves
s by at most one part in 256, so that absmax always becomes q = L: q s is quantised to the same
bytes again, and without a cut |x - q s| <= s / 2. s is never below the smallest normal bfloat16,
2**-126, which also serves blocks of zeros.

Of 8 bits and fewer, integers and scales can be coded by their frequencies (`entropy_coding`):
integers of up to 4 bits two to a byte, others one to a byte, of scales the lower bytes and then the
upper ones. What coding does not make smaller by 32 bytes stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from memfold import entropy_coding
from memfold.errors import InputError

__all__ = [
    "BITS",
    "BLOCK_SIZES",
    "SUFFIXES",
    "Coding",
    "Packing",
    "Rounding",
    "dequantise",
    "nearest",
    "packed_like",
    "quantise",
    "rounded",
]

BITS = (32, 16, 8, 7, 6, 5, 4, 3)
"""Choices of `artifact.bits`; 32 stands for the values' own dtype."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Choices of `artifact.block_size`."""
Coding = Literal["none", "huffman"]
Rounding = Callable[[Tensor, Tensor, int], Tensor]
"""What rounds values: blocks (num_blocks, block_size), their scales (num_blocks,), bits -> whole
numbers of steps, all float32; `nearest` is one."""
SUFFIXES = ("", ".scales", ".coded", ".scales.coded")
"""Of the names of what stands for one tensor; the last two in place of the first."""
_SCALE = torch.bfloat16
_SCALES, _CODED = SUFFIXES[1:3]
_MOST_BITS_CUT = 5  # a cut is never better with more
_MOST_BITS_PAIRED = 4
_NUM_CUTS = 5
_NUMEL_AT_ONCE = 2**17
"""Values that are cut at a time: what is compared for them stays in a processor's cache."""


@dataclass(frozen=True)
class Packing:
    """How values are stored."""

    bits: int = 32
    """One of `BITS`."""
    block_size: int = 64
    """Values that share a scale, at 8 bits and fewer: one of `BLOCK_SIZES`."""
    coding: Coding = "none"
    """Of integers and scales."""

    def __post_init__(self) -> None:
        """Refuse other numbers.

        Raises:
            InputError: One is not among the choices.
        """
        for name, choices in (("bits", BITS), ("block_size", BLOCK_SIZES)):
            value = getattr(self, name)
            if type(value) is not int or value not in choices:
                allowed = ", ".join(map(str, choices))
                raise InputError(f"artifact.{name} must be one of {allowed}, got {value!r}")


def packed_like(shape: Sequence[int], packing: Packing, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what `quantise` makes of a tensor, before it is coded, without the values.

    Args:
        shape: Of the tensor.
        packing: How it is stored.
        dtype: Of the tensor.

    Returns:
        Suffix of the name -> tensor on the meta device: see `quantise`.
    """
    bits, numel = packing.bits, prod(shape)
    if bits >= 16:
        is_half = bits == 16 and dtype.itemsize != 2
        return {"": torch.empty(shape, dtype=torch.float16 if is_half else dtype, device="meta")}
    if bits < 8:
        values = torch.empty(-(-numel * bits // 8), dtype=torch.uint8, device="meta")
    else:
        values = torch.empty(shape, dtype=torch.int8, device="meta")
    num_blocks = -(-numel // packing.block_size)
    return {"": values, _SCALES: torch.empty(num_blocks, dtype=_SCALE, device="meta")}


def nearest(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round each value to the nearest step.

    Args:
        blocks: Float32, (num_blocks, block_size).
        scales: Float32, (num_blocks,).
        bits: 8 to 3.

    Returns:
        Whole numbers of steps that the bits can hold, float32 of the shape of the blocks.
    """
    limit = _limit(bits)
    return (blocks / scales.unsqueeze(1)).round_().clamp_(-limit, limit)


def quantise(values: Tensor, packing: Packing, rounding: Rounding = nearest) -> dict[str, Tensor]:
    """Turn values into the tensors that stand for them, on the same device if they are not coded.

    Args:
        values: Floating point, any shape.
        packing: How they are stored.
        rounding: At 8 bits and fewer, what rounds them. So that what is read back is quantised to
            the same bytes again, it leaves the largest values of each block to `nearest`.

    Returns:
        Suffix of the name -> tensor. 32: `""`, the values themselves, unchecked. 16: `""`, float16,
        or the values themselves where they have 16 bits already. 8: `""`, int8 of the same shape,
        and `".scales"`, bfloat16, one per block. b < 8: the same with `""` uint8 of shape
        (ceil(numel b / 8),), two's complement, value i in the bits b i and up, the lowest bit of a
        byte first. Coded: `".coded"` and `".scales.coded"`, uint8, in place of either.

    Raises:
        InputError: At fewer than 32 bits, a value is not finite or beyond the range of the format,
            which is 65504 at 16 bits; fewer take every float32.
    """
    bits = packing.bits
    if bits == 32:
        return {"": values}
    values = values.detach()
    if not bool(values.isfinite().all()):
        raise InputError(f"artifact.bits={bits}: values that are not finite cannot be stored")
    if bits == 16:
        half = values if values.itemsize == 2 else values.to(torch.float16)
        _check_range(half, values, bits)
        return {"": half}
    blocks = _blocks(values.float(), packing.block_size)
    scales = _scales(blocks, bits, values.dtype)
    _check_range(scales, values, bits)
    codes = rounding(blocks, scales.float(), bits).to(torch.int8).flatten()[: values.numel()]
    stored = codes.reshape(values.shape) if bits == 8 else _pack(codes, bits)
    parts = {"": stored, _SCALES: scales}
    if packing.coding == "none":
        return parts
    coded = {
        "": entropy_coding.encode(_symbols(codes, bits)),
        _SCALES: entropy_coding.encode(scales.view(torch.uint8).view(-1, 2).T.flatten()),
    }
    return {
        suffix + (_CODED if is_smaller else ""): coded[suffix] if is_smaller else part
        for suffix, part in parts.items()
        for is_smaller in [coded[suffix].nbytes + entropy_coding.LEAST_SAVED <= part.nbytes]
    }


def dequantise(
    parts: Mapping[str, Tensor], shape: Sequence[int], packing: Packing, dtype: torch.dtype
) -> Tensor:
    """Turn what `quantise` returned back into values.

    Args:
        parts: Suffix -> tensor, as `quantise` returns them; others are not looked at.
        shape: Shape of the values.
        packing: How they are stored; whether they are coded, the parts say.
        dtype: Of the result. Below 32 bits, values beyond its range become its largest: q s of the
            largest value of a block may be half a step beyond it.

    Returns:
        Tensor of `shape` and `dtype`, on the device of the parts.

    Raises:
        InputError: A part is missing, of a wrong dtype or size, or holds what `quantise` never
            writes.
    """
    shape, bits = tuple(shape), packing.bits
    numel = prod(shape)
    num_blocks = -(-numel // packing.block_size)
    if bits == 32:
        return _part(parts, "", bits, numel, None).reshape(shape).to(dtype)
    if bits == 16:
        values = _part(parts, "", bits, numel, (torch.float16, torch.bfloat16))
        return _saturate(values.reshape(shape), dtype)
    if _SCALES + _CODED in parts:
        planes = _part(parts, _SCALES + _CODED, bits, 2 * num_blocks, (torch.uint8,))
        scales = planes.view(2, -1).T.contiguous().view(_SCALE).flatten()
    else:
        scales = _part(parts, _SCALES, bits, num_blocks, (_SCALE,)).flatten()
    if not bool((scales.isfinite() & (scales >= torch.finfo(_SCALE).tiny)).all()):
        raise InputError(f"artifact.bits={bits}: stored scales are damaged")
    if _CODED in parts:
        num_symbols = -(-numel // 2) if bits <= _MOST_BITS_PAIRED else numel
        symbols = _part(parts, _CODED, bits, num_symbols, (torch.uint8,))
        codes = _codes_of_symbols(symbols, bits)[:numel]
    elif bits == 8:
        codes = _part(parts, "", bits, numel, (torch.int8,)).flatten()
    else:
        packed = _part(parts, "", bits, -(-numel * bits // 8), (torch.uint8,))
        codes = _unpack(packed.flatten(), bits)[:numel]
    if bool((codes < -_limit(bits)).any()):
        raise InputError(f"artifact.bits={bits}: stored values are damaged")
    values = _blocks(codes.float(), packing.block_size) * scales.float().unsqueeze(1)
    return _saturate(values.flatten()[:numel].reshape(shape), dtype)


def rounded(values: Tensor, packing: Packing) -> Tensor:
    """Return what is read back of values that were stored, in one go and without checks.

    Args:
        values: Floating point, any shape; not finite ones make their block not finite.
        packing: How they would be stored.

    Returns:
        `dequantise(quantise(values, packing), values.shape, packing, torch.float32)`, in the dtype
        of the values.
    """
    values, bits = values.detach(), packing.bits
    if bits == 32:
        return values
    if bits == 16:
        return values if values.itemsize == 2 else values.to(torch.float16).to(values.dtype)
    blocks = _blocks(values.float(), packing.block_size)
    scales = _scales(blocks, bits, values.dtype).float()
    read = nearest(blocks, scales, bits).mul_(scales.unsqueeze(1))
    largest = torch.finfo(torch.float32).max
    return read.flatten()[: values.numel()].clamp_(-largest, largest).view(values.shape).to(values)


def _limit(bits: int) -> int:
    """Largest |q|."""
    return 2 ** (bits - 1) - 1


def _blocks(values: Tensor, size: int) -> Tensor:
    """Flatten row by row into (blocks, size), the last one padded with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _scales(blocks: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the scale of each row of blocks (num_blocks, size) float32, of values in `dtype`."""
    if bits > _MOST_BITS_CUT:
        return _rounded_scales(blocks.abs().amax(dim=1) / _limit(bits))
    at_once = blocks.split(_NUMEL_AT_ONCE // blocks.shape[1])
    return torch.cat([_cut_scales(rows, bits, dtype) for rows in at_once])


def _cut_scales(blocks: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the scale of each row that has the least squared error."""
    limit, device = _limit(bits), blocks.device
    cuts = 1 - torch.arange(_NUM_CUTS, device=device).unsqueeze(1) * (0.8 / 2**bits)
    largest = blocks.abs().amax(dim=1)
    # A number of the values' dtype, so that what is read back in it has this scale again.
    scales = _rounded_scales((largest * cuts).to(dtype).float() / limit)
    # In units of the largest value, whose square may be beyond float32.
    unit = largest.clamp(min=torch.finfo(torch.float32).tiny)
    relative, steps = blocks / unit.unsqueeze(1), (scales / unit).unsqueeze(2)
    errors = (relative / steps).round_().clamp_(-limit, limit).mul_(steps).sub_(relative)
    best = torch.linalg.vector_norm(errors, dim=2).argmin(dim=0, keepdim=True)
    return scales.gather(0, best).squeeze(0)


def _rounded_scales(scales: Tensor) -> Tensor:
    return scales.to(_SCALE).clamp(min=torch.finfo(_SCALE).tiny)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """int8 (n,) -> uint8 (ceil(n bits / 8),): eight values are `bits` bytes."""
    masked = codes.view(torch.uint8) & (2**bits - 1)
    eights = torch.nn.functional.pad(masked, (0, -len(codes) % 8)).view(-1, 8)
    words = _joined(eights, bits)
    packed = torch.stack([((words >> 8 * i) & 255).to(torch.uint8) for i in range(bits)], dim=1)
    return packed.flatten()[: -(-len(codes) * bits // 8)].clone()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return int8, eight for each `bits` bytes, the last of which may have been cut off."""
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words = _joined(groups, 8)
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    codes = [((((words >> bits * i) & mask) ^ half) - half).to(torch.int8) for i in range(8)]
    return torch.stack(codes, dim=1).flatten()


def _symbols(codes: Tensor, bits: int) -> Tensor:
    """int8 (n,) -> uint8, the bytes that are coded."""
    masked = codes.view(torch.uint8) & (2**bits - 1)
    if bits > _MOST_BITS_PAIRED:
        return masked
    pairs = torch.nn.functional.pad(masked, (0, len(masked) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _codes_of_symbols(symbols: Tensor, bits: int) -> Tensor:
    """Undo `_symbols`; two for each byte, the last of which may be none."""
    if bits <= _MOST_BITS_PAIRED:
        symbols = torch.stack([symbols & 15, symbols >> 4], dim=1).flatten()
    half = 2 ** (bits - 1)
    return (((symbols & (2 * half - 1)).short() ^ half) - half).to(torch.int8)


def _joined(rows: Tensor, bits: int) -> Tensor:
    """Join the numbers of each row, of so many bits, to one, the first as its lowest bits."""
    words = rows[:, 0].long()
    for i in range(1, rows.shape[1]):
        words |= rows[:, i].long() << (bits * i)
    return words


def _saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp(-largest, largest).to(dtype)


def _check_range(rounded: Tensor, values: Tensor, bits: int) -> None:
    if not bool(rounded.isfinite().all()):
        largest = float(values.abs().amax())
        other = "32, or 8 and fewer" if bits == 16 else "32"
        raise InputError(
            f"artifact.bits={bits} cannot hold a value of size {largest:.3g}; take {other}"
        )


def _part(
    parts: Mapping[str, Tensor],
    suffix: str,
    bits: int,
    numel: int,
    dtypes: tuple[torch.dtype, ...] | None,
) -> Tensor:
    """Return a part after checks; dtypes None: any floating-point one."""
    what = f"artifact.bits={bits}: stored {'scales' if suffix.startswith(_SCALES) else 'values'}"
    if suffix not in parts:
        raise InputError(f"{what} are missing")
    part = parts[suffix]
    if suffix.endswith(_CODED):
        try:
            part = entropy_coding.decode(part)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
    if not (part.is_floating_point() if dtypes is None else part.dtype in dtypes):
        raise InputError(f"{what} have dtype {part.dtype}")
    if part.numel() != numel:
        raise InputError(f"{what} have {part.numel()} entries, expected {numel}")
    return part
