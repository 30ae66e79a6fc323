"""Any importable class or function as a backbone."""

from collections.abc import Mapping

from torch import nn

from memfold.backbones.facts import named_facts
from memfold.data.spec import DataSpec
from memfold.errors import InputError
from memfold.importing import call, locate

__all__ = ["build_custom"]


def build_custom(
    spec: DataSpec, *, target: str | None, args: Mapping[str, object] | None = None
) -> nn.Module:
    """Call the class or function at the dotted path `target` and return its module.

    Facts about the data are passed by keyword, each when the target's signature names it and
    `args` does not set it: see `memfold.backbones.facts`.

    Args:
        spec: What the data are.
        target: For example "package.module.Class".
        args: Further keyword arguments of the target.

    Raises:
        InputError: The path does not lead to a callable, its signature does not fit `args` or the
            data, or what it returned is no nn.Module.
    """
    build = locate(target, "backbone.target")
    facts = named_facts(build, spec, f"backbone.target={target}")
    model = call(build, args, facts, "backbone")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"backbone.target={target}: returned {type(model).__name__}, must return a "
            "torch.nn.Module"
        )
    return model
