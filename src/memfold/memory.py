"""Count bytes: what a model stores, what training keeps resident, what a step needs at its peak."""

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from memfold.compression.accounting import state_tensors, tensor_bytes, unique_tensors
from memfold.compression.compressed_model import check_whole
from memfold.compression.materialise import with_values
from memfold.compression.merged_norms import merged_in
from memfold.compression.state import Compression, compressions_in

__all__ = ["Footprint", "PeakMeter", "footprint", "grad_sync_bytes", "train_state_bytes"]


@dataclass(frozen=True)
class Footprint:
    """Bytes that have to be stored to rebuild the inference function."""

    dense_bytes: int
    """The whole dense model: parameters and persistent buffers, each tensor once."""
    value_bytes: int
    """Learned values in place of the compressible weights."""
    index_bytes: int
    """Masks, indices, scales and seeds."""
    untouched_bytes: int
    """Everything else: biases, norms, buffers, excluded weights, as `Strategy.untouched_bits` and
    `merge_norms` store them."""
    stored_bytes: int
    """Values, indices and untouched tensors together."""
    ratio: float
    """Stored learned values over compressible weights, as counts: the papers' meaning."""
    stored_ratio: float
    """Stored bytes over dense bytes: the honest one."""
    num_weights: int
    """Compressible weights of the dense model, n."""
    num_values: int
    """Learned values stored in their place, m."""


@with_values()
def footprint(model: nn.Module) -> Footprint:
    """Count the bytes that a model stores.

    A model that no strategy has seen counts as dense, and all of its tensors as untouched.

    Args:
        model: A compressed model, or one that holds compressed models.

    Raises:
        InputError: `model` is a part of a compressed model without its values.
    """
    check_whole(model)
    parts = [part for _, part in compressions_in(model)]
    places = compressions_in(model, remove_duplicate=False)
    owned = {prefix + name for prefix, part in places for name in part.owned_names()}
    left = state_tensors(model, leave_out=owned)
    merged = {prefix + name for prefix, part in places for name in _merged(part)}
    kept = {name: tensor for name, tensor in left.items() if name not in merged}
    untouched = sum(_untouched_bytes(name, tensor, places) for name, tensor in kept.items())
    values = sum(part.value_bytes for part in parts)
    indices = sum(part.index_bytes for part in parts)
    stored = values + indices + untouched
    dense = sum(part.dense_bytes + part.lost_bytes for part in parts)
    dense += tensor_bytes(left.values())
    num_weights = sum(part.num_weights for part in parts)
    num_values = sum(part.num_values for part in parts)
    return Footprint(
        dense_bytes=dense,
        value_bytes=values,
        index_bytes=indices,
        untouched_bytes=untouched,
        stored_bytes=stored,
        ratio=num_values / num_weights if num_weights else 1.0,
        stored_ratio=stored / dense if dense else 1.0,
        num_weights=num_weights,
        num_values=num_values,
    )


def _merged(part: Compression) -> frozenset[str]:
    if not part.strategy.merge_norms:
        return frozenset()
    return merged_in(part.model, state_tensors(part.model, leave_out=part.owned_names()))


def _untouched_bytes(name: str, tensor: Tensor, parts: Sequence[tuple[str, Compression]]) -> int:
    """Count a tensor in the file of the compressed part that it is in."""
    own = (part.strategy for prefix, part in parts if name.startswith(prefix))
    dtype = next((strategy.untouched_dtype(tensor.dtype) for strategy in own), tensor.dtype)
    return tensor.numel() * dtype.itemsize


def train_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Count everything resident that is proportional to the model: bytes, each storage once.

    Parameters, buffers (persistent or not), gradients as they are now, optimizer state, and what
    a strategy keeps beside them. Call it after an optimizer step, before gradients are dropped.
    """
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if optimizer is not None:
        tensors += _optimizer_tensors(optimizer)
    counted = tensor_bytes(tensor for _, tensor in unique_tensors(tensors))
    parts = [part for _, part in compressions_in(model)]
    copies = sum(part.rounding.nbytes for part in parts if part.rounding is not None)
    return counted + copies + sum(part.resident_bytes for part in parts)


def grad_sync_bytes(model: nn.Module) -> int:
    """Count the bytes of gradients that DDP reduces in one step, on any number of ranks."""
    return tensor_bytes(
        parameter
        for _, parameter in unique_tensors(model.named_parameters())
        if parameter.requires_grad
    )


class PeakMeter:
    """Peak memory since `start`.

    On CUDA, the allocator's own peak. On the CPU, the largest resident size of the process above
    what it was at `start`; where the system cannot reset that peak (outside Linux), memory that
    was freed before `start` may hide a smaller later peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0

    def start(self) -> None:
        """Reset the peak and take the baseline."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._baseline = 0
            return
        with suppress(OSError):
            # Resets VmHWM, the high-water mark (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
        self._baseline = psutil.Process().memory_info().rss

    def peak_bytes(self) -> int:
        """Return the peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _resident_peak() - self._baseline)


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for owner, state in optimizer.state.items():
        # Some optimizers keep a count of steps there, beside the states of parameters.
        entries = state.items() if isinstance(state, dict) else ((owner, state),)
        for key, value in entries:
            if isinstance(value, Tensor):
                yield str(key), value
