"""Keep built weights out of what autograd saves for the backward pass.

`torch.autograd.graph.saved_tensors_hooks` sees every tensor that an operation saves. One that is a
weight of the running pass, or a view of one, is replaced by a note of which it is, and built again
when the backward pass asks for it. A weight is recognised by its storage as long as the tensor
that was built is alive (a weak reference tells): an address alone is reused once memory is freed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from memfold.compression.read_only import ReadOnlyWeight
from memfold.strategies.sharing.slot_source import SlotSource

__all__ = ["SavedWeights"]


class _Note(NamedTuple):
    """How to build a view of a weight again."""

    source: SlotSource
    index: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Saved(NamedTuple):
    """Any other tensor, as the hooks around ours packed it, or itself with its version."""

    packed: Any
    version: int | None


class SavedWeights:
    """The hooks of one forward pass; `enter` and `leave` bracket it.

    Only the innermost hooks are called by PyTorch, so those around (checkpointing, offloading to
    the CPU) are called from here for everything that is not a weight.
    """

    def __init__(self, source: SlotSource) -> None:
        self._source = source
        self._built: dict[int, tuple[ref[Tensor], int, torch.dtype]] = {}
        self._noted: set[tuple[int, torch.dtype]] = set()
        self._outer_pack: Callable[[Tensor], Any] | None = None
        self._outer_unpack: Callable[[Any], Tensor] | None = None
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def enter(self) -> None:
        """Install the hooks."""
        # Private, and the only way to know: PyTorch's own checkpoints ask it as well.
        autograd = torch._C._autograd  # type: ignore[attr-defined]
        outer = autograd._top_saved_tensors_default_hooks(False)
        if outer is not None:
            self._outer_pack, self._outer_unpack = outer
        unpack = _Unpack(self._outer_unpack)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, unpack)
        self._hooks.__enter__()

    def leave(self) -> None:
        """Remove the hooks."""
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None

    def remember(self, weight: Tensor, index: int) -> None:
        """Tell which weight a tensor is that was just built."""
        address = weight.untyped_storage().data_ptr()
        self._built[address] = (ref(weight), index, weight.dtype)

    def _pack(self, tensor: Tensor) -> object:
        if type(tensor) in (Tensor, ReadOnlyWeight) and tensor.layout == torch.strided:
            found = self._built.get(tensor.untyped_storage().data_ptr())
            if found is not None and found[0]() is not None and found[2] == tensor.dtype:
                key = found[1:]
                if key in self._noted:
                    self._source.mark_repeated(*key)
                self._noted.add(key)
                place = tensor.size(), tensor.stride(), int(tensor.storage_offset())
                return _Note(self._source, *key, *place)
        if self._outer_pack is not None:
            return _Saved(self._outer_pack(tensor), None)
        # Detached: an operation's own output would tie the graph to itself, and never be freed.
        return _Saved(tensor.detach(), tensor._version)


class _Unpack:
    """Kept by the graph: it must not hold what belongs to the forward pass."""

    def __init__(self, outer: Callable[[Any], Tensor] | None) -> None:
        self._outer = outer

    def __call__(self, saved: _Note | _Saved) -> Tensor:
        if isinstance(saved, _Note):
            weight = saved.source.read_again(saved.index, saved.dtype)
            return weight.as_strided(saved.size, saved.stride, saved.offset)
        if self._outer is not None:
            return self._outer(saved.packed)
        if saved.packed._version != saved.version:
            # What PyTorch itself checks for tensors that no hook has packed.
            raise RuntimeError(
                "a tensor needed for the gradient computation, of shape "
                f"{tuple(saved.packed.shape)}, was changed in place after the forward pass: it is "
                f"at version {saved.packed._version}, expected {saved.version}"
            )
        return saved.packed
