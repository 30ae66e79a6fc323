"""Hooks around the loops of a stack's middle, which change what its layers are given.

Hooks on the first layer and on the last layer of each loop do it, so that the model's own code
hands on caches, masks and positions as before. Parameters lie on the root. The hooks stay out of
compiled graphs, one of which need not see what another has left.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from threading import local
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import

from memfold.errors import InputError

__all__ = ["LoopHooks", "split_stream"]

Streams = TypeVar("Streams")


class _Running(local):
    """The loop that a thread's pass is in, and what is kept until its end. A copy is in none."""

    loop: tuple[int, Any] | None = None
    stream: Any = None
    """What the next loop has to begin with, that very object."""

    def __reduce__(self) -> tuple[type["_Running"], tuple[()]]:
        return _Running, ()


class LoopHooks(ABC, Generic[Streams]):
    """Passes what it makes of the residual stream, `Streams`, through the loops of a model."""

    def __init__(
        self, name: str, root: nn.Module, loops: Sequence[Sequence[nn.Module]], width: int
    ) -> None:
        """Take note of the layers.

        Args:
            name: Of the strategy, for messages.
            root: It has or will have the parameters.
            loops: Layers of each.
            width: d, the size of the stream.
        """
        self.name = name
        self.root = root
        self.loops = loops
        self.width = width
        self._running = _Running()

    @abstractmethod
    def begin(self, stream: Tensor) -> Streams:
        """Take the stream (..., d) before the first loop."""

    @abstractmethod
    def enter(self, number: int, streams: Streams) -> tuple[Tensor, Any]:
        """Return the stream that a loop begins with, and what `leave` needs."""

    @abstractmethod
    def leave(self, number: int, kept: Any, output: Tensor) -> Streams:
        """Take the stream with which a loop ends."""

    @abstractmethod
    def end(self, streams: Streams) -> Tensor:
        """Return the stream (..., d) after the last loop."""

    def connect(self) -> None:
        """Change what the model computes, from now on, in copies and pickles too."""
        self.loops[0][0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for layers in self.loops[1:]:
            layers[0].register_forward_pre_hook(self._follow, with_kwargs=True)
        for layers in self.loops:
            layers[-1].register_forward_hook(self._end)
        self.root.register_forward_hook(self._leave, always_call=True)

    @property
    def kept(self) -> Any:
        """What was kept of the loop that this thread's pass is in; `None` outside of loops."""
        return None if self._running.loop is None else self._running.loop[1]

    @_disable_dynamo
    def _begin(
        self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check_first_time()
        stream, inputs, options = split_stream(layer, inputs, options)
        return (self._enter(0, self.begin(self._checked(layer, stream))), *inputs), options

    @_disable_dynamo
    def _follow(self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check that a loop begins with what the one before gave."""
        self._check_first_time()
        stream, _, _ = split_stream(layer, inputs, options)
        if self._running.loop is None or stream is not self._running.stream:
            raise self._not_looped()

    @_disable_dynamo
    def _end(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        self._check_first_time()
        loop, self._running.loop = self._running.loop, None
        if loop is None or self.loops[loop[0]][-1] is not layer:
            raise self._not_looped()
        number, kept = loop
        is_tuple = isinstance(output, tuple)
        streams = self.leave(number, kept, self._checked(layer, output[0] if is_tuple else output))
        is_last = number + 1 == len(self.loops)
        stream = self.end(streams) if is_last else self._enter(number + 1, streams)
        return (stream, *output[1:]) if is_tuple else stream

    @_disable_dynamo
    def _leave(self, root: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Let go of what is kept of a pass that has failed: then there is no output."""
        loop, self._running.loop, self._running.stream = self._running.loop, None, None
        if loop is not None and output is not None:
            raise self._not_looped()

    def _enter(self, number: int, streams: Streams) -> Tensor:
        stream, kept = self.enter(number, streams)
        self._running.loop, self._running.stream = (number, kept), stream
        return stream

    def _checked(self, layer: nn.Module, stream: Any) -> Tensor:
        is_plain = isinstance(stream, Tensor) and not stream.is_nested
        if not is_plain or stream.shape[-1] != self.width:
            found = tuple(stream.shape) if is_plain else f"a {type(stream).__name__}"
            raise InputError(
                f"{self.name}: {type(layer).__name__} takes or gives {found}; a stream of shape "
                f"(..., {self.width}), not a nested one, is needed"
            )
        return stream

    def _check_first_time(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise InputError(
                f"{self.name}: whole layers cannot be computed again in the backward pass; "
                "use trainer.activation_checkpointing, which computes what is inside of them again"
            )

    def _not_looped(self) -> InputError:
        return InputError(
            f"{self.name}: the repeated layers were not called one after the other, all of them, "
            "each with what the one before gave: such a model cannot be looped"
        )


def split_stream(
    layer: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Tell a layer's first argument, which is the stream, from the others, however it is given."""
    if inputs:
        return inputs[0], inputs[1:], dict(options)
    _, name, *_ = inspect.signature(type(layer).forward).parameters
    return options.get(name), (), {key: v for key, v in options.items() if key != name}
