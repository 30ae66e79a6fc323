"""The forward passes of one model that run now, thread by thread."""

from abc import ABC, abstractmethod
from threading import get_ident
from types import FrameType

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
        self._frame: FrameType | None = None

    @abstractmethod
    def weight(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return weight number `index`; the same tensor as long as something holds it."""

    def enter(self, frame: FrameType) -> None:
        """Belong to the call with this frame, until it is left."""
        self._frame = frame

    def is_over(self) -> bool:
        """Whether the call has ended, even if nobody said so.

        PyTorch runs no hooks after a KeyboardInterrupt, and only Python knows that its frame is
        left: one that still runs cannot be cleared.
        """
        if self._frame is None:
            return False
        try:
            self._frame.clear()
        except RuntimeError:
            return False
        return True

    def leave(self) -> None:
        """End it."""
        self._frame = None


class RunningPasses:
    """Begun passes; a model may call itself, and several threads may call it."""

    def __init__(self) -> None:
        self._passes: dict[int, list[RunningPass]] = {}

    def __len__(self) -> int:
        return sum(len(passes) for passes in self._passes.values())

    def innermost(self) -> RunningPass | None:
        """Return this thread's innermost pass, after those that were interrupted are gone."""
        passes = self._passes.get(get_ident(), [])
        while passes and passes[-1].is_over():
            passes.pop().leave()
        return passes[-1] if passes else None

    def begin(self, started: RunningPass, frame: FrameType) -> None:
        """Enter a pass, which belongs to the call with this frame."""
        self._passes.setdefault(get_ident(), []).append(started)
        started.enter(frame)

    def end(self) -> None:
        """Leave this thread's innermost pass, if there is one."""
        passes = self._passes.get(get_ident())
        if passes:
            passes.pop().leave()
            if not passes:
                del self._passes[get_ident()]


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
