"""A stack whose first and last layers are their own, and whose middle is passed several times.

Bae et al., "Mixture-of-recursions", 2025, arXiv 2507.10524: middle-cycle.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from memfold.errors import InputError
from memfold.options import Interval
from memfold.strategies.layers.loop_hooks import LoopHooks
from memfold.strategies.layers.repeated import Layers, Stack
from memfold.strategies.layers.tied import TiedWeights, TyingStrategy

__all__ = ["LoopedWeights", "MiddleLoop"]


@dataclass(frozen=True, kw_only=True)
class MiddleLoop(TyingStrategy):
    """Loop the middle layers; `ratio` says how many these are."""

    default_ratio: ClassVar[float] = 0.5
    """A quarter of the layers' weights begins, half is looped, a quarter ends."""

    loops: Annotated[int, Interval("[2, inf)")] = 3
    """Passes through the middle."""

    def sizes(self, stack: Stack) -> Sequence[int]:
        """Return how many layers the middle may have."""
        inner = len(stack) - 2
        if inner < self.loops:
            works = "2 works" if inner == 2 else f"2 to {inner} work"
            remedy = works if inner > 1 else "4 layers or more are needed"
            raise InputError(
                f"compression.loops={self.loops}: of {len(stack)} repeated layers the first and "
                f"the last stay out of the loop; {remedy}"
            )
        return range(inner // self.loops, 0, -1)


class LoopedWeights(TiedWeights):
    """`<weight>_tied` at the first layer that uses it; what hooks need on the root.

    The densified model keeps that and the hooks: there is no plain one with the same function.
    """

    def __init__(
        self, strategy: MiddleLoop, layers: Layers, size: int, more: Sequence[str]
    ) -> None:
        """Take note of the layers, of how many are in the middle, and of the root's parts."""
        model, stack = layers.model, layers.stack
        looped = strategy.loops * size
        begin = (len(stack) - looped) // 2
        end = range(begin + size, len(stack) - looped + size)
        entries = (*range(begin), *(begin + i % size for i in range(looped)), *end)
        super().__init__(strategy, layers, entries, dict.fromkeys(more, "model"))
        _check_whole(strategy.name, model, stack.paths)
        modules = [model.get_submodule(path) for path in stack.paths]
        loops = [modules[i : i + size] for i in range(begin, begin + looped, size)]
        width = _width(strategy.name, modules[0], stack.paths[0])
        self.hooks = self.make_hooks(strategy, model, loops, width)

    @abstractmethod
    def make_hooks(
        self, strategy: MiddleLoop, model: nn.Module, loops: list[list[nn.Module]], width: int
    ) -> LoopHooks:
        """Make what changes the loops; see `LoopHooks`."""

    def attach(self, parts: Mapping[str, Iterable[Tensor]]) -> None:
        """See `ComputedWeights.attach`."""
        super().attach(parts)
        self.hooks.connect()


def _check_whole(name: str, model: nn.Module, paths: Sequence[str]) -> None:
    """Check that no layer is a part of a module that computes more before the next layer.

    Raises:
        InputError: One is.
    """
    for path in paths:
        whole = path
        while (around := whole.rpartition(".")[0]) and not any(
            other != path and other.startswith(f"{around}.") for other in paths
        ):
            whole = around
        own = set(model.get_submodule(path).parameters())
        if not own.issuperset(model.get_submodule(whole).parameters()):
            raise InputError(
                f"{name}: {path} is a part of {whole}, which computes more: loops are of whole "
                "layers, each of which takes what the one before gave"
            )


def _width(name: str, layer: nn.Module, path: str) -> int:
    """Return the size that all matrices of a layer have in common.

    Raises:
        InputError: There is none, or there are several.
    """
    shapes = [set(tensor.shape) for tensor in layer.parameters() if tensor.dim() == 2]
    common = set.intersection(*shapes) if shapes else set()
    if len(common) != 1:
        sizes = ", ".join(map(str, sorted(common))) or "no size"
        raise InputError(
            f"{name}: the residual stream of {path} cannot be told from its matrices, which "
            f"have {sizes} in common; one is needed"
        )
    (width,) = common
    return width
