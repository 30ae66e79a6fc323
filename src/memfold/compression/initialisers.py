"""Which code gives the tensors of a module their initial values, found without any layer class."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any
from warnings import warn

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Initialisers", "written_storages"]

_NAMES = ("reset_parameters", "_reset_parameters")
_FOR_EACH = "_init_weights"


class Initialisers:
    """The initialisers of a model's modules.

    A module's own is `reset_parameters`, or `_reset_parameters` (`nn.MultiheadAttention`). Models
    in the manner of Hugging Face have another one on the root, `_init_weights(module)`, which is
    called for every module after its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {module: path for path, module in model.named_modules()}
        for_each = getattr(model, _FOR_EACH, None)
        self._for_each = for_each if _takes(for_each, model) else None

    def inside_out(self, owners: Collection[nn.Module]) -> Iterator[nn.Module]:
        """Yield the modules that hold one of `owners`: children first, siblings as registered."""
        seen: set[nn.Module] = set()

        def visit(module: nn.Module) -> Iterator[nn.Module]:
            if module not in seen:
                seen.add(module)
                for child in module.children():
                    yield from visit(child)
                yield module

        for module in visit(self._model):
            if any(inner in owners for inner in module.modules()):
                yield module

    def responsible_for(self, module: nn.Module) -> nn.Module | None:
        """Return the module whose initialiser fills the tensors of `module`.

        It is the module itself where it has one, or the root has one for all; else the nearest
        around it that has one, as for an `nn.ParameterList`; `None` where there is none.
        """
        if self.own(module) is not None or self._for_each is not None:
            return module
        modules = {path: module for module, path in self._paths.items()}
        path = self._paths[module]
        while path:
            path = path.rpartition(".")[0]
            if path in modules and self.own(modules[path]) is not None:
                return modules[path]
        return None

    def own(self, module: nn.Module) -> Callable[[], object] | None:
        """Return the initialiser that a module has itself, one that needs no arguments."""
        methods = (getattr(module, name, None) for name in _NAMES)
        return next((method for method in methods if _takes(method)), None)

    def call(self, module: nn.Module, *, own: bool) -> None:
        """Initialise a module: by its own initialiser if `own`, then by that of the root."""
        method = self.own(module)
        if own and method is not None:
            method()
        if self._for_each is not None:
            self._for_each(module)

    def describe(self, module: nn.Module) -> str:
        """Name what initialises a module, for messages."""
        method = self.own(module)
        names = [] if method is None else [f"{type(module).__name__}.{method.__name__}"]
        if self._for_each is not None:
            names.append(f"{type(self._model).__name__}.{_FOR_EACH}")
        return " and ".join(names)

    def warn_ignored(self, modules: Collection[nn.Module]) -> None:
        """Say which initialisers are not called, because their module has no tensors itself."""
        names = {self.describe(module) for module in modules if self.own(module) is not None}
        if names:
            warn(
                f"{', '.join(sorted(names))}: not called for a model on the meta device; the "
                "modules inside are initialised one at a time, each by its own",
                stacklevel=2,
            )


@contextmanager
def written_storages() -> Iterator[set[int]]:
    """Note the storages that PyTorch's operations write to, views of them included."""
    recorder = _Recorder()
    with recorder:
        yield recorder.storages


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor):
                        self.storages.add(tensor.untyped_storage()._cdata)
        return func(*args, **kwargs)


def _takes(method: Any, *arguments: nn.Module) -> bool:
    if not callable(method):
        return False
    try:
        signature(method).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True
