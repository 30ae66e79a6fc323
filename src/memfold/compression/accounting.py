"""Count what a model holds, each tensor once."""

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

__all__ = ["extent", "state_tensors", "storage_key", "tensor_bytes", "ties_of", "unique_tensors"]


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what two names of the same tensor have in common: memory, offset, shape, strides."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def extent(tensor: Tensor) -> tuple[int, int, int]:
    """Return the storage of a tensor, and the first and last byte there that it may touch."""
    spans = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset()) * tensor.itemsize
    last = first + (int(sum(spans)) + 1) * tensor.itemsize - 1
    return tensor.untyped_storage()._cdata, first, last


def unique_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor once, under its first name, when several names share it."""
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors:
        key = storage_key(tensor)
        if tensor.numel() > 0 and key in seen:
            continue
        seen.add(key)
        yield name, tensor


def state_tensors(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of `model`, a tied tensor once.

    Args:
        model: Any module. What its state dict holds besides tensors is left out.
        leave_out: State-dict names to skip.
    """
    state = model.state_dict(keep_vars=True).items()
    return dict(
        unique_tensors((k, v) for k, v in state if isinstance(v, Tensor) and k not in leave_out)
    )


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return the further state-dict names of tied tensors: name -> first name of that tensor."""
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel() > 0:
            known = first.setdefault(storage_key(tensor), name)
            if known != name:
                ties[name] = known
    return ties


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors, each counted as given."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
