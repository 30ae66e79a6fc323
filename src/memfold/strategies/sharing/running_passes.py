"""The forward passes of one model that run now, thread by thread."""

from abc import ABC, abstractmethod
from threading import get_ident
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from memfold.errors import InputError

__all__ = ["RunningPass", "RunningPasses", "check_not_exported"]


class RunningPass(ABC):
    """What the weights are read from while one call of the root lasts."""

    def __init__(self, values: Tensor) -> None:
        """Begin with phi, of shape (m,), as it is now."""
        self.values = values
        self.tracked = torch.is_grad_enabled() and values.requires_grad

    @abstractmethod
    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return weight number `index`; the same tensor as long as something holds it."""

    def enter(self) -> None:  # noqa: B027 (most have nothing to do)
        """Serve a call."""

    def leave(self) -> None:  # noqa: B027
        """Serve it no more."""


class _Call(NamedTuple):
    served: RunningPass
    """In evaluation, several calls may have the same."""
    frame: FrameType
    """Of the root's call."""

    def is_over(self) -> bool:
        """Whether the call has ended, even if nobody said so.

        PyTorch runs no hooks after a KeyboardInterrupt, and only Python knows that its frame is
        left: one that still runs cannot be cleared.
        """
        try:
            self.frame.clear()
        except RuntimeError:
            return False
        return True


class RunningPasses:
    """Calls that last; a model may call itself, and several threads may call it."""

    def __init__(self) -> None:
        self._calls: dict[int, list[_Call]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    def innermost(self) -> RunningPass | None:
        """Return the pass of this thread's innermost call, after interrupted ones are gone."""
        calls = self._calls.get(get_ident(), [])
        while calls and calls[-1].is_over():
            calls.pop().served.leave()
        return calls[-1].served if calls else None

    def begin(self, started: RunningPass, frame: FrameType) -> None:
        """Let a pass serve the call with this frame."""
        self._calls.setdefault(get_ident(), []).append(_Call(started, frame))
        started.enter()

    def end(self) -> None:
        """End this thread's innermost call, if there is one."""
        calls = self._calls.get(get_ident())
        if calls:
            calls.pop().served.leave()
            if not calls:
                del self._calls[get_ident()]


def check_not_exported() -> None:
    """Check that no program is made of the model: what shares its values stays in this process.

    Raises:
        InputError: `torch.jit.trace`, `torch.export` or `torch.onnx.export` runs.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        raise InputError(
            "weights that are computed from shared values can be neither traced nor exported: give "
            "memfold.densify(model) to torch.jit.trace, torch.export or torch.onnx.export"
        )
