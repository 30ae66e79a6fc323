"""Artifacts: the file that rebuilds the inference function, in safetensors format.

It holds the stored bytes of the footprint and nothing else, after a header that describes the
tensors and, as metadata, the strategy and the weights that it was made for.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from memfold.artifact_file import read, write
from memfold.compression.accounting import extent, state_tensors, ties_of
from memfold.compression.compressed_model import (
    check_not_compressed,
    check_whole,
    restore_dense,
)
from memfold.compression.error_feedback import feedback_roundings
from memfold.compression.materialise import filler, with_values
from memfold.compression.merged_norms import merge, num_merged, separate
from memfold.compression.record import Record
from memfold.compression.samples import Batch
from memfold.compression.state import Compression, compressions_in
from memfold.compression.strategy import Strategy
from memfold.errors import InputError
from memfold.quantisation import SUFFIXES, dequantise, nearest, quantise
from memfold.strategies.dense import Dense

__all__ = ["header_bytes", "load", "save"]


@with_values()
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bits: int | None = None,
    data: Iterable[Batch] | None = None,
) -> int:
    """Write a model's artifact; an existing file is replaced once the new one is complete.

    The file takes `footprint(model).stored_bytes` plus `header_bytes(path)`; where both `coding`
    and `data` are given, what codes take follows from the data.

    Args:
        model: A compressed model; one that no strategy has seen is stored as dense.
        path: Usually ends in `.safetensors`.
        bits: Bits per learned value: 32, 16, or 8 to 3, in place of the strategy's own `bits`. The
            untouched tensors keep their dtype, or have the strategy's `untouched_bits`.
        data: Batches of (input, target), all of which are read: values of 8 bits and fewer are
            then rounded so that the layers' outputs on them change little, one value making up for
            the errors of others (`memfold.compression.error_feedback`). By default each is rounded
            to the nearest.

    Returns:
        Size of the file in bytes.

    Raises:
        InputError: The folder does not exist, the model's state holds something that is not a
            tensor, or one of a kind that the format lacks, a layer was replaced after it was
            compressed, `model` is a part or a wrapper of a compressed model, `bits` is not
            allowed, an untouched tensor does not fit into 16 bits, or error feedback is not for
            this model, its bits or these data.
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"artifact {path}: must be a file in a folder that exists")
    compression = _compression(model)
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InputError(f"{name} in the model's state is no dense tensor and cannot be stored")
    owned: frozenset[str] = frozenset()
    strategy: Strategy = Dense()
    values, indices, num_values, weights, reshaped = {}, {}, 0, {}, {}
    ties = ties_of(model)
    if compression is not None:
        compression.check_places()
        strategy, owned = compression.strategy, compression.owned_names()
        values, indices = compression.value_tensors(), compression.index_tensors()
        num_values = compression.num_values
        shapes = zip(compression.names, compression.shapes, strict=True)
        weights = {name: list(shape) for name, shape in shapes}
        reshaped = {name: list(shape) for name, shape in compression.dense_shapes().items()}
        ties = {name: first for name, first in ties.items() if name not in owned} | compression.ties
    if bits is not None:
        strategy = replace(strategy, bits=bits, train_bits=None)
    untouched = state_tensors(model, leave_out=owned)
    merged = None
    if strategy.merge_norms:
        kept = merge(model, untouched)
        untouched, merged = kept, num_merged(untouched.keys() - kept.keys())
    tensors = indices | {n: _narrow(n, t, strategy) for n, t in untouched.items()}
    packing = strategy.packing
    roundings = {} if data is None else feedback_roundings(compression, packing, data)
    for name, value in values.items():
        parts = quantise(value, packing, roundings.get(name, nearest))
        tensors |= {name + suffix: part for suffix, part in parts.items()}
    record = Record(
        strategy,
        num_values,
        weights,
        {name: list(value.shape) for name, value in values.items()},
        frozenset(indices),
        reshaped,
        ties,
        merged,
    )
    write(path, tensors, record)
    return path.stat().st_size


@with_values()
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    form: Literal["compressed", "dense"] = "compressed",
) -> nn.Module:
    """Turn a freshly built dense backbone into the model of an artifact, in place.

    Args:
        path: Written by `save`.
        model: The same backbone, on any device, with any values. Its dtype stays: values stored in
            another one, or in fewer bits, are converted. For an artifact of shared weights, or of
            a model that was never compressed, it may be on the meta device: then it goes to the
            device of its other tensors, to PyTorch's default device where it has none, and the
            weights never exist in dense form.
        form: `compressed` gives the model that was saved; `dense` a plain module with the same
            function, whose weights are built once, for inference at the dense model's speed.

    Returns:
        `model`, with the artifact's values.

    Raises:
        InputError: The file is missing, damaged, not an artifact, or made for another backbone,
            ties included; `form` is another word; a tensor on the meta device is not in the
            artifact; a tensor of the model cannot be written. Whatever fails, the model is then
            unchanged.
    """
    path = Path(path)
    if form not in ("compressed", "dense"):
        raise InputError(f"form must be compressed or dense, got {form!r}")
    check_not_compressed(model)
    record, stored = read(path)
    tensors = _unpack(path, record, stored)
    statistics = separate(model, tensors) if record.strategy.merge_norms else {}
    tensors |= statistics
    _check_backbone(path, model, record, tensors)
    if record.merged not in (None, num_merged(statistics)):
        raise InputError(
            f"artifact {path} is of another backbone: of its BatchNorms {record.merged} have no "
            f"statistics of their own, of this one's {num_merged(statistics)}"
        )
    try:
        with _unchanged_on_failure(model) as overwritten:
            _take(model, record, tensors, overwritten)
            if form == "dense":
                restore_dense(model)
    except InputError as error:
        raise InputError(f"artifact {path}: {error}") from error
    except Exception as error:  # whatever the model's own tensors and modules raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"artifact {path} does not go into this model: {reason}") from error
    return model


def header_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes of an artifact describe it: an 8-byte length and the JSON header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _narrow(name: str, tensor: Tensor, strategy: Strategy) -> Tensor:
    """Give an untouched tensor the dtype that the file has it in."""
    narrow = tensor.detach().to(strategy.untouched_dtype(tensor.dtype))
    if not torch.equal(narrow.isfinite(), tensor.isfinite()):
        raise InputError(
            f"{name} has values beyond 65504, the range of 16 bits: artifact.untouched_bits=32"
        )
    return narrow


def _take(
    model: nn.Module,
    record: Record,
    tensors: Mapping[str, Tensor],
    overwritten: list[tuple[Tensor, Tensor]],
) -> None:
    """Turn `model` into the one that was saved; note every tensor and what it was before."""
    plain = tensors.keys() - (record.values.keys() | record.indices)
    dense = state_tensors(model)
    fill = filler(model, [*tensors, *record.weights])
    filled = {name for name, target in dense.items() if target.is_meta}
    # What stays is written first, for what follows hardly fails.
    stays = plain - (filled | record.reshaped.keys())
    _overwrite({name: dense[name] for name in stays}, tensors, overwritten)
    if record.weights:
        names = list(record.weights)
        record.strategy.restore(model, names, record.num_values, tensors)
    fill(tensors)
    # Weights that are stored as they are, and all of a network that has become narrower.
    done = {id(target) for target, _ in overwritten}
    names = (plain | record.weights.keys() & tensors.keys()) - filled
    state = state_tensors(model)
    late = {name: state[name] for name in names if id(state[name]) not in done}
    _overwrite(late, tensors, overwritten)
    if not _made_ties(record, dense).items() <= ties_of(model).items():
        raise InputError(f"{record.strategy.name} ties other tensors of this model than it says")


def _overwrite(
    targets: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    overwritten: list[tuple[Tensor, Tensor]],
) -> None:
    in_memory = Counter(extent(target)[0] for target in targets.values())
    with torch.no_grad():
        for name, target in targets.items():
            overwritten.append((target, target.clone()))
            _write(target, tensors[name])
        for name, target in targets.items():
            if in_memory[extent(target)[0]] == 1 and 0 not in target.stride():
                continue
            if not torch.allclose(target, tensors[name].to(target), 0, 0, equal_nan=True):
                raise InputError(
                    f"its {name} has values of its own, where this model's shares memory with "
                    "another tensor or between its own entries"
                )


def _write(target: Tensor, values: Tensor) -> None:
    """Copy, also into what `expand` has made, where many entries are one place in memory."""
    places = tuple(slice(1) if step == 0 else slice(None) for step in target.stride())
    target[places].copy_(values[places])


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put back modules, and the values in the list that is given out, if the body fails."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    contents = [
        (registry, dict(registry))
        for _, _, attributes in before
        for registry in attributes.values()
        if type(registry) in (dict, OrderedDict)  # of parameters, modules, hooks
    ]
    overwritten: list[tuple[Tensor, Tensor]] = []
    try:
        yield overwritten
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for registry, content in contents:
            registry.clear()
            registry.update(content)
        with torch.no_grad():
            for target, values in reversed(overwritten):
                _write(target, values)
        raise


def _unpack(path: Path, record: Record, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn packed values back into floating-point tensors of their shapes."""
    unpacked = dict(tensors)
    for name, shape in record.values.items():
        parts = {
            suffix: unpacked.pop(name + suffix) for suffix in SUFFIXES if name + suffix in tensors
        }
        packing = record.strategy.packing
        dtype = parts[""].dtype if packing.bits == 32 and "" in parts else torch.float32
        try:
            unpacked[name] = dequantise(parts, shape, packing, dtype)
        except InputError as error:
            raise InputError(f"artifact {path}: {name}: {error}") from error
    return unpacked


def _check_backbone(
    path: Path, model: nn.Module, record: Record, tensors: Mapping[str, Tensor]
) -> None:
    """Compare names, shapes, kinds and ties with the dense backbone before it is touched."""
    other = f"artifact {path} is of another backbone"
    stored = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stored |= record.weights | record.reshaped
    own = state_tensors(model)
    made = _made_ties(record, own)
    for name, target in own.items():
        if name in made:
            continue
        if name not in tensors and name not in record.weights:
            raise InputError(f"{other}: it has no {name}{_tied(record.ties, name)}")
        if stored[name] != list(target.shape):
            raise InputError(
                f"{other}: its {name} has shape {stored[name]}, this one's has {list(target.shape)}"
            )
        if name in tensors and not torch.can_cast(tensors[name].dtype, target.dtype):
            raise InputError(
                f"{other}: its {name} is {tensors[name].dtype}, this one's {target.dtype}"
            )
    ties = ties_of(model)
    known = own.keys() | ties.keys()
    plain = tensors.keys() - (record.values.keys() | record.indices)
    for name in sorted(plain | record.weights.keys()):
        if name not in known:
            raise InputError(f"{other}: this one has no {name}")
        if name in ties:
            raise InputError(f"{other}: this one has no {name} of its own{_tied(ties, name)}")
    # What has further names of its own has them for the tensor that it is tied to.
    wanted = {name: made.get(first, first) for name, first in ties.items()} | made
    if record.ties is not None and record.ties != wanted:
        name, first = sorted(record.ties.items() ^ wanted.items())[0]
        owner = "its" if name in record.ties else "this one's"
        raise InputError(f"{other}: {owner} {name} is the same tensor as {first} (tied)")


def _made_ties(record: Record, dense: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the ties that the strategy makes: names of their own in the dense model."""
    ties = (record.ties or {}) if record.strategy.ties_untouched else {}
    return {name: first for name, first in ties.items() if name in dense}


def _tied(ties: Mapping[str, str] | None, name: str) -> str:
    first = (ties or {}).get(name)
    return "" if first is None else f": it is tied to {first}"


def _compression(model: nn.Module) -> Compression | None:
    """Return the compression of a model; refuse parts of one, and what holds one."""
    check_whole(model)
    found = dict(compressions_in(model))
    for prefix in filter(None, found):
        part = prefix.removesuffix(".")
        raise InputError(f"the compressed model is the part {part!r}: save that part")
    return found.get("")
