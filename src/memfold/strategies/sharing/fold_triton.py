"""What `fold` does, by Triton kernels, with the signs of single weights in the same pass.

The kernels use no atomics, and sum in an order that depends on sizes alone: the same numbers give
the same bits in every run. Whether a multiplication and an addition are rounded as one is said at
every launch, for Triton's default changes with its versions.
"""

import struct
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from memfold.strategies.sharing import fold
from memfold.strategies.sharing.fold import Block
from memfold.strategies.sharing.signs import OuterSigns

__all__ = ["add_blocks", "read_blocks", "uses_triton"]

_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Weights or slots for each program of a grid.
_READ_NUMEL = 1024
_ADD_NUMEL = 512
# Windows are split over so many programs that all of a GPU has work, not so many that little is
# left to each. No property of the GPU enters: the order of summation is the same on all of them.
_PROGRAMS = 2048
_WINDOWS_PER_PROGRAM = 16


def uses_triton(slots: Tensor, weights: Tensor) -> bool:
    """Whether the kernels of this module can run: on a GPU for which Triton compiles.

    Args:
        slots: Shape (m,).
        weights: A flattened tensor on the same device.
    """
    return (
        slots.is_cuda
        and slots.dtype in (torch.float32, torch.float64)
        and weights.dtype in _WEIGHT_DTYPES
        and _compiles(slots.device)
    )


def read_blocks(
    slots: Tensor, blocks: Sequence[Block], factor: float, out: Tensor, signs: OuterSigns | None
) -> None:
    """Write factor * sign * slots[window] to each block's place in `out`, in one pass over it.

    Args:
        slots: Shape (m,), float32 or float64.
        blocks: All of one tensor.
        factor: The same for all of its weights.
        out: The flattened tensor: float32, float64, bfloat16 or float16.
        signs: Of single weights, beside those of the windows.
    """
    for block in blocks:
        if signs is None and len(block.starts) == 1:
            # A window or two slices of it: torch starts faster than a kernel, with no table.
            fold.read_block(slots, block, factor, out)
            continue
        target = out[block.offset : block.stop]
        with torch.cuda.device_of(slots):
            _kernels().read_kernel[(_ceil_div(target.numel(), _READ_NUMEL),)](
                slots,
                _window_table(block, slots.device),
                *_sign_tables(signs),
                target,
                _bits(factor),
                slots.numel(),
                block.length,
                target.numel(),
                *_sign_place(signs, block.offset),
                BLOCK=_READ_NUMEL,
                enable_fp_fusion=False,
            )


def add_blocks(
    weights: Tensor, blocks: Sequence[Block], factor: float, out: Tensor, signs: OuterSigns | None
) -> None:
    """Add factor * sign * weights to the windows of `out`: the adjoint of `read_blocks`.

    Sums are taken in the dtype of `out`.

    Args:
        weights: The flattened tensor: float32, float64, bfloat16 or float16.
        blocks: All of that tensor.
        factor: The same for all of its weights.
        out: Shape (m,), float32 or float64, changed in place.
        signs: Of single weights, beside those of the windows.
    """
    weights = weights.contiguous()
    for block in blocks:
        if signs is None and len(block.starts) == 1:
            fold.add_block(weights, block, factor, out)
        else:
            _add_block(weights, block, factor, out, signs)


def _add_block(
    weights: Tensor, block: Block, factor: float, out: Tensor, signs: OuterSigns | None
) -> None:
    m, num_windows = out.numel(), len(block.starts)
    # One window may touch a small part of a large vector; more windows are partitions of it.
    first_slot, num_covered = (int(block.starts[0]), block.length) if num_windows == 1 else (0, m)
    num_programs = _ceil_div(num_covered, _ADD_NUMEL)
    num_parts = max(1, min(num_windows // _WINDOWS_PER_PROGRAM, _PROGRAMS // num_programs))
    windows_per_part = _ceil_div(num_windows, num_parts)
    num_parts = _ceil_div(num_windows, windows_per_part)
    target = out if num_parts == 1 else out.new_empty(num_parts, num_covered)
    with torch.cuda.device_of(out):
        _kernels().add_kernel[(num_programs, num_parts)](
            weights[block.offset : block.stop],
            _window_table(block, out.device),
            *_sign_tables(signs),
            target,
            _bits(factor),
            m,
            block.length,
            num_windows,
            windows_per_part,
            first_slot,
            num_covered,
            *_sign_place(signs, block.offset),
            PARTS=num_parts > 1,
            BLOCK=_ADD_NUMEL,
            enable_fp_fusion=False,
        )
    if num_parts > 1:
        out.add_(target.sum(0), alpha=factor)


def _window_table(block: Block, device: torch.device) -> Tensor:
    """Pack starts, or their complement ~start for sign -1: int32, shape (windows,)."""
    packed = np.where(block.signs > 0, block.starts, ~block.starts).astype(np.int32)
    # Pageable memory is staged before the call returns; a blocking copy would wait for the GPU.
    return torch.from_numpy(packed).to(device, non_blocking=True)


def _sign_tables(signs: OuterSigns | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if signs is None else (signs.rows, signs.columns)


def _sign_place(signs: OuterSigns | None, offset: int) -> tuple[int, int]:
    """Return the place of the weight at `offset` among the signs, and the number of columns."""
    return (0, 1) if signs is None else (signs.first + offset, len(signs.columns))


def _bits(factor: float) -> int:
    return struct.unpack("<q", struct.pack("<d", factor))[0]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _kernels() -> ModuleType:
    # Imported late: `import memfold` loads torch only, and Triton is not on every machine.
    from memfold.strategies.sharing import fold_kernels

    return fold_kernels


@cache
def _compiles(device: torch.device) -> bool:
    """Try the kernels on a few numbers: Triton also needs a C compiler, and a GPU that it knows."""
    # bfloat16 is in hardware from compute capability 8.0 on.
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    slots = torch.ones(3, device=device)
    blocks = [Block(0, 2, np.array([0, 2]), np.array([1, -1]))]
    weights = slots.new_empty(4)
    try:
        read_blocks(slots, blocks, 2.0, weights, None)
        add_blocks(weights, blocks, 1.0, slots, None)
        torch.cuda.synchronize(device)
    except Exception as error:  # What Triton raises depends on what is missing.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"Triton kernels do not run on {device}, torch operations replace them ({cause})",
            stacklevel=2,
        )
        return False
    return True
