"""Seconds of a call, and bytes that a forward pass keeps for its backward pass."""

from collections.abc import Callable, Iterable
from time import perf_counter
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["saved_bytes", "time_call", "time_calls"]

_BUDGET_SECONDS = 1.5
_MAX_CALLS = 200
_NUM_WARMUP = 3


class _Packed:
    """A tensor in the place where the autograd graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, on CUDA those between two events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000
    start = perf_counter()
    call()
    return perf_counter() - start


def time_calls(call: Callable[[], object], device: torch.device, min_calls: int) -> list[float]:
    """Time a call again and again, after a warm-up.

    Args:
        call: Does the same every time.
        device: Where it does it.
        min_calls: Timed calls, at least; short ones are repeated for 1.5 s or 200 times.
            Before them come 3 calls, or 1 that takes long.

    Returns:
        Seconds of each timed call.
    """
    if time_call(call, device) < _BUDGET_SECONDS / 10:
        for _ in range(_NUM_WARMUP - 1):
            call()
    seconds: list[float] = []
    while len(seconds) < min_calls or (
        sum(seconds) < _BUDGET_SECONDS and len(seconds) < _MAX_CALLS
    ):
        seconds.append(time_call(call, device))
    return seconds


def saved_bytes(forward: Callable[[], object], leave_out: Iterable[Tensor]) -> int:
    """Count the bytes that the graph of a forward pass keeps for the backward pass.

    Each storage counts once and in full, however many views of it are kept. What is counted goes
    through `torch.autograd.graph.saved_tensors_hooks`: tensors that an autograd function keeps in
    other ways, and those that hooks inside `forward` take for themselves, are not seen.

    Args:
        forward: Returns what holds the graph.
        leave_out: Tensors that are there anyway: parameters, buffers, inputs.
    """
    live: WeakSet[_Packed] = WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        # An operation's own result, kept as it is, would hold the operation and never be freed.
        packed = _Packed(tensor.detach())
        live.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        held = forward()
    # What the graph dropped again in the forward pass is gone from the set by now.
    storages = {p.tensor.untyped_storage()._cdata: p.tensor.untyped_storage() for p in live}
    for tensor in leave_out:
        storages.pop(tensor.untyped_storage()._cdata, None)
    total = sum(storage.nbytes() for storage in storages.values())
    del held
    return total
