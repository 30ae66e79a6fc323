"""What can be done with a model that is compressed, and what one has to be like."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memfold.compression.computed_attributes import check_computable, computed_sources
from memfold.compression.fake_quantisation import FakeQuantisation
from memfold.compression.materialise import check_has_values, with_values
from memfold.compression.parametrised import copy_model
from memfold.compression.selection import CompressibleWeight
from memfold.compression.state import STATE, Compression, compression_of, compressions_in
from memfold.errors import InputError

__all__ = [
    "before_step",
    "check_not_compressed",
    "check_replaceable",
    "check_still_there",
    "check_whole",
    "densify",
    "extra_loss",
    "prepare_step",
    "release",
    "restore_dense",
    "set_compression",
]

# Methods of transformers models that write or replace dense weights, without a word if there are
# none.
_SAVE = "save_pretrained"
_DENSE_ONLY = (_SAVE, "push_to_hub", "tie_weights", "resize_token_embeddings")


def before_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, total_steps: int
) -> None:
    """Let the strategy act between the backward pass and the optimizer's step.

    Dynamic sparse training changes its structure here, low-rank factors get their decay. Call it
    once per optimizer step, on every rank, when gradients are complete (reduced, unscaled).
    Strategies that do nothing while training ignore it. A strategy that replaces the optimizer's
    step, as RigL does where it changes the structure, leaves all gradients at `None`: optimizers
    skip such parameters.

    Args:
        model: A compressed model, or what holds one: DDP, a compiled model, a LightningModule.
        optimizer: It trains the model's parameters.
        step: Optimizer steps done before this one.
        total_steps: Optimizer steps in the whole training.

    Raises:
        InputError: There is no compressed model in `model`, or there are several; or the optimizer
            trains none of the compressed weights, which is looked at in the first step.
    """
    compression = compression_of(model)
    if compression is None:
        raise InputError(
            f"before_step: there is no compressed model in {type(model).__name__}: give it what "
            "memfold.compress returned, or a module that holds it"
        )
    if step == 0:
        _check_trains(optimizer, compression)
    if compression.rounding is not None:
        compression.rounding.release()
    compression.before_step(optimizer, step, total_steps)
    prepare_step(model, step=step + 1, total_steps=total_steps)


def prepare_step(model: nn.Module, *, step: int, total_steps: int) -> None:
    """Get ready for the forward pass of a step, which `before_step` does for the step after it.

    A training that goes on in the middle calls it once, before its first forward pass.

    Args:
        model: As in `before_step`; one that is not compressed is left alone.
        step: Optimizer steps done.
        total_steps: Optimizer steps in the whole training.
    """
    compression = compression_of(model)
    if compression is not None:
        compression.prepare_step(step, total_steps)
        if compression.rounding is not None:
            compression.rounding.prepare_step(step, total_steps)


def extra_loss(model: nn.Module) -> Tensor | float:
    """Return what the strategy adds to the loss in training, for the forward pass just done.

    In any loop: `(loss + memfold.extra_loss(model)).backward()`.

    Args:
        model: A compressed model, or what holds one.

    Returns:
        A scalar with a graph; 0 for strategies that add nothing, and models without one.

    Raises:
        InputError: `model` holds several compressed models.
    """
    compression = compression_of(model)
    term = None if compression is None else compression.extra_loss()
    return 0.0 if term is None else term


def release(model: nn.Module) -> None:
    """Let go of what passes leave behind.

    A model keeps computed weights from one evaluation batch to the next. The next pass with
    gradients or in training mode lets go of them too; a copy that is only ever evaluated, such as
    an average of weights, has none. One that trains with `train_bits` has rounded values in its
    parameters from a pass with gradients to `before_step`; here it gets back what is trained.

    Args:
        model: A compressed model, or one that holds compressed models; any other is left alone.
    """
    for _, compression in compressions_in(model):
        compression.release()
        if compression.rounding is not None:
            compression.rounding.release()


def _check_trains(optimizer: torch.optim.Optimizer, compression: Compression) -> None:
    names = compression.owned_names()
    owned = {id(p) for name, p in compression.model.named_parameters() if name in names}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if owned and owned.isdisjoint(trained):
        raise InputError(
            "the optimizer trains none of the compressed weights: make it after memfold.compress, "
            "which replaces parameters"
        )


def set_compression(model: nn.Module, compression: Compression) -> None:
    """Hang a compression on the root module that it was made for."""
    model.__dict__[STATE] = compression
    if compression.strategy.train_bits is not None:
        start = compression.strategy.train_bits_from
        compression.rounding = FakeQuantisation(compression, start)
    model.__dict__["_apply"] = partial(_convert, model)
    if not any(computed_sources(module) for module in model.modules()):
        return  # dense weights, as those of dense and small are
    for module in model.modules():
        for name in _DENSE_ONLY:
            if callable(getattr(type(module), name, None)):
                refused = partial(_refuse, name)
                module.__dict__[name] = refused if name != _SAVE else partial(_save, module)


def _convert(
    model: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what `nn.Module._apply` does to a whole model: layers go where the values go."""
    type(model)._apply(model, change, recurse)
    for module in model.modules():
        for source in computed_sources(module):
            source.convert(lambda values: values)
    return model


def _refuse(name: str, *arguments: object, **options: object) -> None:
    raise InputError(
        f"{name} needs dense weights, which a compressed model does not have: call it on "
        "memfold.densify(model); memfold.save(model, path) keeps the compressed one"
    )


def _save(module: nn.Module, *arguments: object, **options: object) -> object:
    """Save as training loops do, which name a `state_dict`, to go on from that; refuse the rest.

    The class itself reads no such folder: see `ComputedWeights.dense_names`.
    """
    if "state_dict" not in options:
        _refuse(_SAVE)
    save: Any = getattr(type(module), _SAVE)
    return save(module, *arguments, **options)


def check_not_compressed(model: nn.Module) -> None:
    """Check that no part of a model is compressed.

    Raises:
        InputError: One is.
    """
    check_whole(model)
    for prefix, found in compressions_in(model):
        where = f"its part {prefix.removesuffix('.')!r}" if prefix else "it"
        raise InputError(f"the model is compressed already: {where} has {found.strategy}")


def check_still_there(
    model: nn.Module, names: Sequence[str], places: Sequence[Sequence[tuple[nn.Module, str]]]
) -> None:
    """Check that a model still has the modules of these weights.

    Raises:
        InputError: One was replaced.
    """
    modules = set(model.modules())
    for name, owners in zip(names, places, strict=True):
        if any(module not in modules for module, _ in owners):
            raise InputError(f"{name}: its module was replaced after the model was compressed")


def check_whole(model: nn.Module) -> None:
    """Check that the weights of a compressed model are not looked at without their values.

    Raises:
        InputError: `model` is a part of a compressed model that does not hold the values.
    """
    modules = set(model.modules())
    for path, module in model.named_modules():
        if any(source.root not in modules for source in computed_sources(module)):
            raise InputError(
                f"{path or type(model).__name__} is a part of a compressed model and its values "
                "are elsewhere: use the whole model, or memfold.densify(model) first"
            )


@with_values()
def densify(model: nn.Module) -> nn.Module:
    """Return a plain dense copy of `model` with the same function and state-dict names.

    The copy has the classes, parameters and ties of the backbone as its author wrote it; `model`
    stays as it is.

    Raises:
        InputError: `model` is a part of a compressed model without its values.
    """
    check_whole(model)
    dense = copy_model(model)
    restore_dense(dense)
    return dense


def restore_dense(model: nn.Module) -> None:
    """Turn a compressed model, or one that holds some, into a plain dense one, in place."""
    for module in list(model.modules()):
        compression = module.__dict__.pop(STATE, None)
        if compression is not None:
            del module.__dict__["_apply"]
            if compression.rounding is not None:
                compression.rounding.conclude()
            compression.restore_dense()
            for part in module.modules():
                for name in _DENSE_ONLY:
                    part.__dict__.pop(name, None)


def check_replaceable(
    model: nn.Module,
    weights: Sequence[CompressibleWeight],
    *,
    initialises: bool = False,
) -> None:
    """Check that these weights can become computed ones with values of one kind.

    Args:
        model: The root module.
        weights: The weights to replace.
        initialises: Whether the strategy gives values to tensors on the meta device.

    Raises:
        InputError: They differ in dtype or device, have no values, or their module refuses.
    """
    if not initialises:
        check_has_values(model)
    tensors = [weight.tensor for weight in weights]
    for key, values in (
        ("dtypes", {str(t.dtype) for t in tensors}),
        ("devices", {str(t.device) for t in tensors if not t.is_meta}),
    ):
        if len(values) > 1:
            raise InputError(
                f"the compressible weights have several {key} ({', '.join(sorted(values))}); "
                "one is needed: convert the model or narrow compression.include"
            )
    attributes: dict[nn.Module, list[str]] = {}
    paths: dict[nn.Module, str] = {}
    for owner in (owner for weight in weights for owner in weight.owners):
        attributes.setdefault(owner.module, []).append(owner.attribute)
        paths[owner.module] = owner.path
    for module, names in attributes.items():
        check_computable(module, names, paths[module])
