"""Any image classifier of timm, with the data's channels, size and classes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from memfold.backbones.hub import import_extra, refuse_unknown
from memfold.data.spec import DataSpec, Images
from memfold.errors import InputError

__all__ = ["build_timm"]


def build_timm(spec: DataSpec, *, name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model of timm with new weights.

    Args:
        spec: What the data are: images.
        name: Such as `resnet18`.
        options: Further keyword arguments of `timm.create_model`, such as `{drop_rate: 0.1}`.

    Raises:
        InputError: timm does not load, has no such model, or refuses the options; or the data are
            no images.
    """
    inputs = spec.inputs
    if not isinstance(inputs, Images):
        raise InputError(
            f"backbone=timm takes images, and the data give {inputs.kind}; docs/backbones.md lists "
            f"backbones for {inputs.kind}"
        )
    library = import_extra("timm", "timm")
    refuse_unknown(name, library.list_models(), "model of timm")
    facts: dict[str, Any] = {"in_chans": inputs.channels, "num_classes": spec.num_outputs}
    if getattr(library.get_pretrained_cfg(name), "fixed_input_size", False):
        facts["img_size"] = (inputs.height, inputs.width)
    try:
        return library.create_model(name, pretrained=False, **facts | dict(options or {}))
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"backbone.name={name}: {type(error).__name__}: {reason}") from error
