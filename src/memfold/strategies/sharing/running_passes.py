"""The forward passes of one model that run now, thread by thread."""

from threading import get_ident
from types import FrameType

import torch

from memfold.errors import InputError
from memfold.strategies.sharing.forward_pass import ForwardPass

__all__ = ["RunningPasses", "check_not_exported"]


class RunningPasses:
    """Begun passes; a model may call itself, and several threads may call it."""

    def __init__(self) -> None:
        self._passes: dict[int, list[ForwardPass]] = {}

    def __len__(self) -> int:
        return sum(len(passes) for passes in self._passes.values())

    def innermost(self) -> ForwardPass | None:
        """Return this thread's innermost pass, after those that were interrupted are gone."""
        passes = self._passes.get(get_ident(), [])
        while passes and passes[-1].is_over():
            passes.pop().leave()
        return passes[-1] if passes else None

    def begin(self, started: ForwardPass, frame: FrameType) -> None:
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
