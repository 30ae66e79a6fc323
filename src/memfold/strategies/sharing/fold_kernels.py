"""The kernels of RANDOMFOLD; `strategies.sharing.fold_triton` launches them.

On the CPU Triton interprets them where TRITON_INTERPRET=1 is set before they are imported.
Positions in a vector of at most 2^31 slots are 32-bit, places in a tensor 64-bit.
"""

import triton
import triton.language as tl

__all__ = ["add_kernel", "read_kernel"]

# A kernel for each type of these is enough: none for each value that is 1 or divides by 16.
_INTEGERS = ["factor_bits", "num_slots", "length", "first_weight", "num_columns"]
_READ_INTEGERS = [*_INTEGERS, "num_weights"]
_ADD_INTEGERS = [*_INTEGERS, "num_windows", "windows_per_part", "first_slot", "num_covered"]


@triton.jit
def _float_of(bits, dtype: tl.constexpr):
    # A float argument would arrive as float32.
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit(do_not_specialize=_READ_INTEGERS)
def read_kernel(
    slots,
    windows,
    row_signs,
    column_signs,
    out,
    factor_bits,
    num_slots,
    length,
    num_weights,
    first_weight,
    num_columns,
    BLOCK: tl.constexpr,
):
    """Write out[k * length + j] = factor * sign * slots[(start_k + j) % m], BLOCK at a time.

    `windows` holds start_k, or ~start_k for sign -1. The sign of a weight is that of its window,
    times those of its row and of its column, -1 or +1, if there are any: first_weight is the place
    of out[0] in their matrix.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    window = first // length
    lane = tl.arange(0, BLOCK)
    # Both sums of two positions pass 2^31: that of window and lane, that of start and position.
    ahead = (first - window * length).to(tl.uint32) + lane.to(tl.uint32)
    further = ahead // length.to(tl.uint32)
    position = ahead - further * length.to(tl.uint32)
    place = first + lane
    inside = place < num_weights
    packed = tl.load(windows + window + further, mask=inside, other=0)
    negative = packed < 0
    slot = tl.where(negative, ~packed, packed).to(tl.uint32) + position
    slot = tl.where(slot < num_slots.to(tl.uint32), slot, slot - num_slots.to(tl.uint32))
    factor = _float_of(factor_bits, slots.dtype.element_ty)
    value = tl.load(slots + slot, mask=inside, other=0) * factor
    if row_signs is not None:
        row = (first_weight + first) // num_columns
        weight = (first_weight + first - row * num_columns).to(tl.uint32) + lane.to(tl.uint32)
        below = weight // num_columns.to(tl.uint32)
        column = weight - below * num_columns.to(tl.uint32)
        of_row = tl.load(row_signs + row + below, mask=inside, other=1)
        of_column = tl.load(column_signs + column, mask=inside, other=1)
        negative = negative != (of_row != of_column)
    value = tl.where(negative, -value, value)
    if out.dtype.element_ty.primitive_bitwidth == 16:
        # As torch does from float64; nothing for float32.
        value = value.to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_ADD_INTEGERS)
def add_kernel(
    weights,
    windows,
    row_signs,
    column_signs,
    out,
    factor_bits,
    num_slots,
    length,
    num_windows,
    windows_per_part,
    first_slot,
    num_covered,
    first_weight,
    num_columns,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum into each of BLOCK slots what it gets from windows_per_part windows, in their order.

    Adds factor times the sum to `out`, or, with PARTS, stores it in row number program_id(1) of
    `out`, of num_covered columns. Slots that are covered begin at first_slot. The rest as in
    `read_kernel`, with weights[0] at first_weight.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    covered = place < num_covered
    slot = first_slot + place
    slot = tl.where(slot < num_slots, slot, slot - num_slots)
    first_window = tl.program_id(1).to(tl.int64) * windows_per_part
    offset = first_window * length
    total = tl.full((BLOCK,), 0, out.dtype.element_ty)
    for window in range(first_window, tl.minimum(first_window + windows_per_part, num_windows)):
        packed = tl.load(windows + window)
        position = slot.to(tl.int32) - tl.where(packed < 0, ~packed, packed)
        position = tl.where(position < 0, position + num_slots, position)
        found = covered & (position < length)
        value = tl.load(weights + offset + position, mask=found, other=0).to(total.dtype)
        negative = packed < 0
        if row_signs is not None:
            row = (first_weight + offset) // num_columns
            weight = (first_weight + offset - row * num_columns).to(tl.uint32)
            weight += position.to(tl.uint32)
            below = weight // num_columns.to(tl.uint32)
            column = weight - below * num_columns.to(tl.uint32)
            of_row = tl.load(row_signs + row + below, mask=found, other=1)
            of_column = tl.load(column_signs + column, mask=found, other=1)
            negative = negative != (of_row != of_column)
        total += tl.where(negative, -value, value)
        offset += length
    if PARTS:
        tl.store(out + tl.program_id(1).to(tl.int64) * num_covered + place, total, mask=covered)
    else:
        before = tl.load(out + slot, mask=covered, other=0)
        scaled = _float_of(factor_bits, out.dtype.element_ty) * total
        tl.store(out + slot, before + scaled, mask=covered)
