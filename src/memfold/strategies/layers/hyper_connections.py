"""A residual stream in several copies around every loop of a stack's middle."""

from collections.abc import Sequence
from math import inf, log
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.strategies.layers.loop_hooks import LoopHooks

__all__ = ["BIASES", "GATES", "VECTORS", "HyperConnections"]

GATES, BIASES, VECTORS = "loop_gates", "loop_biases", "loop_vectors"
"""Parameters of the root: (loops, 3n, n d), (loops, 3n) and (loops, d). Of the 3n rows, the first n
are for H_pre, the next for H_post, the last for H_res."""

_RES_LOGIT = -4.0
"""Of H_res where its bias is 0: next to nothing is kept."""


class _Kept(NamedTuple):
    """What a loop that runs needs at its end."""

    copies: Tensor
    """(..., n, d), those that it began with."""
    post: Tensor
    """(..., n, 1)"""
    res: Tensor
    """(..., n, 1)"""


class HyperConnections(LoopHooks[Tensor]):
    """Passes n copies y of the stream by each loop F, which reads and writes them through gates.

    y <- H_res y + H_post (F(H_pre y) + e), and the mean of the copies after the last loop. Gates
    are functions of y before the loop. Where all parameters are 0, H_pre = 1/n and H_post = 1.
    """

    def __init__(
        self, root: nn.Module, loops: Sequence[Sequence[nn.Module]], width: int, copies: int
    ) -> None:
        """Take note of the layers, and of n: see `LoopHooks`."""
        super().__init__("hyperloop", root, loops, width)
        self.copies = copies
        # Any constant added to it means nothing where there is one copy, of which all is read.
        self.pre_logit = -log(copies - 1) if copies > 1 else inf

    def begin(self, stream: Tensor) -> Tensor:
        """See `LoopHooks.begin`: (..., n, d)."""
        stream = stream.unsqueeze(-2)
        return stream.expand(*stream.shape[:-2], self.copies, self.width)

    def enter(self, number: int, streams: Tensor) -> tuple[Tensor, _Kept]:
        """See `LoopHooks.enter`."""
        gates, biases = getattr(self.root, GATES)[number], getattr(self.root, BIASES)[number]
        with torch.autocast(streams.device.type, enabled=False):
            flat = F.rms_norm(streams.flatten(-2), (self.copies * self.width,))
            logits = F.linear(flat.to(gates.dtype), gates, biases).to(streams.dtype)
        pre, post, res = logits.unsqueeze(-1).chunk(3, dim=-2)
        kept = _Kept(streams, 2 * post.sigmoid(), (res + _RES_LOGIT).sigmoid())
        return ((pre + self.pre_logit).sigmoid() * streams).sum(-2), kept

    def leave(self, number: int, kept: _Kept, output: Tensor) -> Tensor:
        """See `LoopHooks.leave`."""
        vector = getattr(self.root, VECTORS)[number].to(output.dtype)
        return kept.res * kept.copies + kept.post * (output + vector).unsqueeze(-2)

    def end(self, streams: Tensor) -> Tensor:
        """See `LoopHooks.end`."""
        return streams.mean(-2)
