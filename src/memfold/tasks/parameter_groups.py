"""Which parameters are decayed."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from memfold.compression import compression_of

__all__ = ["parameter_groups"]


def parameter_groups(
    net: nn.Module, decay: Literal["all", "matrices"]
) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
    """Return everything trainable, as an optimizer takes it.

    Args:
        net: Compressed already.
        decay: `all` for one group; `matrices` keeps biases, norms and embeddings free of weight
            decay. What stands for compressed weights is decayed as those are, whatever its shape.
    """
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if decay == "all":
        return trainable.values()
    compression = compression_of(net)
    owned = frozenset() if compression is None else compression.owned_names()
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    decayed, free = [], []
    for name, parameter in trainable.items():
        is_matrix = parameter.dim() > 1 and id(parameter) not in tables
        (decayed if name in owned or is_matrix else free).append(parameter)
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
