"""What the backbones share when they set their first weights and check their options."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from memfold.errors import InputError

__all__ = ["check_pooling", "check_positive", "check_widths", "initialise"]


def check_positive(option: str, value: int) -> None:
    """Raise InputError unless the option `backbone.<option>` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"backbone.{option}={value}: must be an integer of at least 1")


def check_pooling(pooling: int, image_size: int | tuple[int, int]) -> None:
    """Raise InputError unless squares of `backbone.pooling` pixels fit into an image."""
    check_positive("pooling", pooling)
    smallest = min(image_size) if isinstance(image_size, tuple) else image_size
    if pooling > smallest:
        raise InputError(
            f"backbone.pooling={pooling}: must be at most the image's size, {smallest}"
        )


def check_widths(option: str, widths: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Return the widths as a tuple.

    Args:
        option: `backbone.<option>`, for the message.
        widths: One per layer whose width is free.
        count: How many there must be; `None` for any number.

    Raises:
        InputError: They are no list, too many or too few, or not all integers of at least 1.
    """
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise InputError(f"backbone.{option}={widths}: must be a list such as [256,256]")
    if count is not None and len(widths) != count:
        raise InputError(f"backbone.{option}={list(widths)}: must be a list of {count} integers")
    for width in widths:
        check_positive(option, width)
    return tuple(widths)


def initialise(
    model: nn.Module,
    *,
    fan: Literal["fan_in", "fan_out"] = "fan_in",
    norm_weight: Literal["ones", "uniform"] = "ones",
) -> None:
    """Draw new weights for every Linear, Conv2d and BatchNorm of `model`, in place.

    Weights are Kaiming normal (He et al. 2015) for ReLU, std = sqrt(2 / fan); all biases are 0.

    Args:
        model: Its modules are visited in registration order, with the global generator.
        fan: Which fan sets the std.
        norm_weight: "ones", or "uniform" for draws from U(0, 1).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if norm_weight == "uniform":
                nn.init.uniform_(module.weight)
            else:
                nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
