"""A residual stream in several copies around every loop of a stack's middle.

Hooks on the first layer and on the last layer of each loop do it, so that the model's own code
hands on caches, masks and positions as before. Parameters lie on the root. The hooks stay out of
compiled graphs, one of which need not see what another has left.
"""

import inspect
from collections.abc import Sequence
from math import inf, log
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import
from torch.nn import functional as F

from memfold.errors import InputError

__all__ = ["BIASES", "GATES", "VECTORS", "HyperConnections"]

GATES, BIASES, VECTORS = "loop_gates", "loop_biases", "loop_vectors"
"""Parameters of the root: (loops, 3n, n d), (loops, 3n) and (loops, d). Of the 3n rows, the first n
are for H_pre, the next for H_post, the last for H_res."""

_RES_LOGIT = -4.0
"""Of H_res where its bias is 0: next to nothing is kept."""


class _Loop(NamedTuple):
    """What a loop that runs needs at its end."""

    number: int
    copies: Tensor
    """(..., n, d), those that it began with."""
    post: Tensor
    """(..., n, 1)"""
    res: Tensor
    """(..., n, 1)"""


class _Running(local):
    """The pass that a thread is in. A copy is in none."""

    loop: _Loop | None = None

    def __reduce__(self) -> tuple[type["_Running"], tuple[()]]:
        return _Running, ()


class HyperConnections:
    """Passes n copies y of the stream by each loop F, which reads and writes them through gates.

    y <- H_res y + H_post (F(H_pre y) + e), and the mean of the copies after the last loop. Gates
    are functions of y before the loop. Where all parameters are 0, H_pre = 1/n and H_post = 1.
    """

    def __init__(
        self, root: nn.Module, loops: Sequence[tuple[nn.Module, nn.Module]], width: int, copies: int
    ) -> None:
        """Take note of the layers.

        Args:
            root: It has or will have the parameters.
            loops: First and last layer of each.
            width: d, the size of the stream.
            copies: n.
        """
        self.root = root
        self.loops = loops
        self.width = width
        self.copies = copies
        # Any constant added to it means nothing where there is one copy, of which all is read.
        self.pre_logit = -log(copies - 1) if copies > 1 else inf
        self._running = _Running()

    def connect(self) -> None:
        """Change what the model computes, from now on, in copies and pickles too."""
        self.loops[0][0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for _, last in self.loops:
            last.register_forward_hook(self._end)
        self.root.register_forward_hook(self._leave, always_call=True)

    @_disable_dynamo
    def _begin(
        self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _check_first_time()
        if inputs:
            return (self._enter(0, self._copied(layer, inputs[0])), *inputs[1:]), options
        _, name, *_ = inspect.signature(type(layer).forward).parameters
        return (), {**options, name: self._enter(0, self._copied(layer, options.get(name)))}

    @_disable_dynamo
    def _end(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        _check_first_time()
        loop, self._running.loop = self._running.loop, None
        if loop is None or self.loops[loop.number][1] is not layer:
            raise _not_looped()
        is_tuple = isinstance(output, tuple)
        added = self._checked(layer, output[0] if is_tuple else output)
        vector = getattr(self.root, VECTORS)[loop.number].to(added.dtype)
        copies = loop.res * loop.copies + loop.post * (added + vector).unsqueeze(-2)
        is_last = loop.number + 1 == len(self.loops)
        stream = copies.mean(-2) if is_last else self._enter(loop.number + 1, copies)
        return (stream, *output[1:]) if is_tuple else stream

    @_disable_dynamo
    def _leave(self, root: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Let go of the copies of a pass that has failed: then there is no output."""
        loop, self._running.loop = self._running.loop, None
        if loop is not None and output is not None:
            raise _not_looped()

    def _copied(self, layer: nn.Module, stream: Any) -> Tensor:
        stream = self._checked(layer, stream).unsqueeze(-2)
        return stream.expand(*stream.shape[:-2], self.copies, self.width)

    def _enter(self, number: int, copies: Tensor) -> Tensor:
        """Note what the end of a loop needs; return the stream (..., d) that it begins with."""
        gates, biases = getattr(self.root, GATES)[number], getattr(self.root, BIASES)[number]
        with torch.autocast(copies.device.type, enabled=False):
            flat = F.rms_norm(copies.flatten(-2), (self.copies * self.width,))
            logits = F.linear(flat.to(gates.dtype), gates, biases).to(copies.dtype)
        pre, post, res = logits.unsqueeze(-1).chunk(3, dim=-2)
        post, res = 2 * post.sigmoid(), (res + _RES_LOGIT).sigmoid()
        self._running.loop = _Loop(number, copies, post, res)
        return ((pre + self.pre_logit).sigmoid() * copies).sum(-2)

    def _checked(self, layer: nn.Module, stream: Any) -> Tensor:
        is_plain = isinstance(stream, Tensor) and not stream.is_nested
        if not is_plain or stream.shape[-1] != self.width:
            found = tuple(stream.shape) if is_plain else f"a {type(stream).__name__}"
            raise InputError(
                f"hyperloop: {type(layer).__name__} takes or gives {found}; a stream of shape "
                f"(..., {self.width}), not a nested one, is needed"
            )
        return stream


def _check_first_time() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise InputError(
            "hyperloop: whole layers cannot be computed again in the backward pass; "
            "use trainer.activation_checkpointing, which computes what is inside of them again"
        )


def _not_looped() -> InputError:
    return InputError(
        "hyperloop: the repeated layers were not called one after the other, all of them: a model "
        "that leaves some out cannot be looped"
    )
