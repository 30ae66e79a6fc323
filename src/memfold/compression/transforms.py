"""Whether PyTorch's transforms of functions see a tensor."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_transformed"]


def is_transformed(values: Tensor) -> bool:
    """Whether torch.func or forward-mode derivatives work on a tensor.

    They see no side effects, and torch.func takes no hooks on saved tensors.
    """
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    if functorch.peek_interpreter_stack() is not None:
        return True
    # No level is entered outside of forward-mode derivatives: asking for the tangent takes longer.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None
