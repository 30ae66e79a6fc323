"""Count the operations of a forward pass, which a smaller model need not save."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_operations"]


def forward_operations(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-adds of a forward pass in evaluation, weights being computed already.

    Those of matrix products, convolutions, attention and sums of embeddings, as PyTorch's counter
    has them: half of its floating-point operations. Causal attention counts what lies ahead too,
    and the way in which a layer multiplies is the one that it takes for this batch.

    Args:
        model: Any module; its modes stay as they are.
        example: What it takes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_SUMS)
    try:
        with torch.no_grad(), _plain_kernels():
            model(example)  # an evaluation keeps what it computes here
            with counter:
                model(example)
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops() // 2


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Leave out what the counter does not know: fused kernels of attention and recurrence."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _sum_of_rows(table: Sequence[int], indices: Sequence[int], *_: Any, **__: Any) -> int:
    """Count what `nn.functional.embedding_bag` does, as the products of pruned layers use it."""
    return 2 * indices[0] * table[1]


_SUMS = {
    torch.ops.aten._embedding_bag: _sum_of_rows,
    torch.ops.aten._embedding_bag_forward_only: _sum_of_rows,
}
