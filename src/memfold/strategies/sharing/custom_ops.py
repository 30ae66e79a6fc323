"""The maps of parameter sharing as operators that `torch.compile` can put in a graph.

They do what `ScaleSlots`, `ReadWeight` and `AddWeight` do, with arguments that a graph can hold: a
mapping is looked up by its key. The compiler decides what is saved for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from memfold.strategies.sharing.autograd import AddWeight, ReadWeight
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.running_passes import check_not_exported

__all__ = ["compiled_weight", "register_mapping"]

# Never emptied: a graph may outlive the model that it was compiled for. Some kilobytes each.
_MAPPINGS: dict[int, SlotMapping] = {}


def register_mapping(key: int, mapping: SlotMapping) -> None:
    """Let the operators find a mapping. Equal mappings may share a key."""
    _MAPPINGS[key] = mapping


def compiled_weight(
    values: Tensor,
    factors: tuple[Tensor, Tensor],
    key: int,
    index: int,
    scale: float,
    dtype: torch.dtype,
    zero_row: int | None,
) -> Tensor:
    """Build one weight.

    Args:
        values: Phi, shape (m,).
        factors: 1 / nu and Gamma / nu, each of shape (segments,), in the dtype to compute in.
        key: Of the mapping.
        index: Of the weight.
        scale: Its lambda.
        dtype: Of the result.
        zero_row: Row of it that stays zero, if there is one.

    Raises:
        InputError: See `check_not_exported`.
    """
    check_not_exported()
    slots = _scale_slots(values.to(factors[0].dtype), *factors, key)
    return _read_weight(slots, key, index, scale, dtype, zero_row)


@torch.library.custom_op("memfold::scale_slots", mutates_args=())
def _scale_slots(values: Tensor, forward: Tensor, backward: Tensor, key: int) -> Tensor:
    return _MAPPINGS[key].scale(values, forward)


@torch.library.custom_op("memfold::read_weight", mutates_args=())
def _read_weight(
    slots: Tensor, key: int, index: int, scale: float, dtype: torch.dtype, zero_row: int | None
) -> Tensor:
    mapping = _MAPPINGS[key]
    return ReadWeight.forward(slots, mapping, mapping.spans[index], scale, dtype, zero_row)


@torch.library.custom_op("memfold::add_weight", mutates_args=())
def _add_weight(
    weight: Tensor,
    key: int,
    index: int,
    scale: float,
    dtype: torch.dtype,
    slots_dtype: torch.dtype,
    zero_row: int | None,
) -> Tensor:
    mapping = _MAPPINGS[key]
    span = mapping.spans[index]
    return AddWeight.forward(weight, slots_dtype, mapping, span, scale, dtype, zero_row)


@_scale_slots.register_fake
def _(values: Tensor, forward: Tensor, backward: Tensor, key: int) -> Tensor:
    return torch.empty_like(values)


@_read_weight.register_fake
def _(
    slots: Tensor, key: int, index: int, scale: float, dtype: torch.dtype, zero_row: int | None
) -> Tensor:
    return slots.new_empty(_MAPPINGS[key].spans[index].shape, dtype=dtype)


@_add_weight.register_fake
def _(
    weight: Tensor,
    key: int,
    index: int,
    scale: float,
    dtype: torch.dtype,
    slots_dtype: torch.dtype,
    zero_row: int | None,
) -> Tensor:
    return torch.empty(_MAPPINGS[key].num_slots, dtype=slots_dtype, device=weight.device)


def _keep_scaling(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, backward, ctx.key = inputs
    ctx.save_for_backward(backward)


def _scale_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (factor,) = ctx.saved_tensors
    return _scale_slots(gradient, factor, factor, ctx.key), None, None, None


def _keep_reading(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    slots, *ctx.weight, ctx.zero_row = inputs
    ctx.slots_dtype = slots.dtype


def _add_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    slots = _add_weight(gradient, *ctx.weight, ctx.slots_dtype, ctx.zero_row)
    return slots, None, None, None, None, None


def _keep_adding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.weight, _, ctx.zero_row = inputs


def _read_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight = _read_weight(gradient, *ctx.weight, ctx.zero_row)
    return weight, None, None, None, None, None, None


_scale_slots.register_autograd(_scale_gradient, setup_context=_keep_scaling)
_read_weight.register_autograd(_add_gradient, setup_context=_keep_reading)
_add_weight.register_autograd(_read_gradient, setup_context=_keep_adding)
