"""Weights that a run starts from: those of a file or of another run, in the dense backbone."""

import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

import memfold
from memfold.compression.accounting import ties_of
from memfold.compression.parts import MARKS
from memfold.data.spec import DataSpec
from memfold.errors import InputError
from memfold.files import open_regular
from memfold.runs.folder import ARTIFACT, HYDRA_FOLDER, can_be_resumed
from memfold.strategies.layers.repeated import repeated_layers
from memfold.strategies.pruning.stored_masks import FINGERPRINT as KEPT_FINGERPRINT
from memfold.strategies.sharing.shared_vector import FINGERPRINT as SHARED_FINGERPRINT
from memfold.training.checkpoint_reading import read_plain_values
from memfold.training.foreign_code import named_code
from memfold.training.load import load_model
from memfold.training.networks import build_backbone

__all__ = ["InitialWeights", "read_initial_weights"]

_INSIDE = ("state_dict", "model_state_dict", "model")
"""What files of trainings call the state dict that is among other things in them."""
_CHECKPOINTS: Mapping[str, Literal["last", "best"]] = {"last.ckpt": "last", "best.ckpt": "best"}
_COMPRESSED = (MARKS, SHARED_FINGERPRINT, KEPT_FINGERPRINT)
_MOST_NAMES = 6


class InitialWeights:
    """Tensors that are to become the dense backbone's, and a report of which did."""

    def __init__(
        self,
        source: str,
        tensors: Mapping[str, Tensor],
        *,
        strict: bool,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Keep them.

        Args:
            source: As the user names it.
            tensors: By state-dict name, perhaps behind a prefix that all of a network's have.
            strict: Whether all of the backbone's must be there, in its shapes, and no others.
            layers: For each repeated layer of the backbone, which one's tensors it gets, by its
                number there; those of others are left out. `None`: the one of its own number.
        """
        self._source = source
        self._tensors = tensors
        self._strict = strict
        self._layers = layers
        self.report: dict[str, Any] = {"source": source}
        """For `result.json`, once `fill` was called: how many were taken, and names."""

    def fill(self, net: nn.Module) -> None:
        """Give a dense backbone the values; it is unchanged when this raises.

        Raises:
            InputError: Tensors are missing, superfluous or of another shape or kind, and it is
                strict; or nothing fits, values are not finite, or a tied tensor has two values; or
                `layers` names one that is not there.
        """
        state = net.state_dict(keep_vars=True)
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        prefix, found = _without_prefix(self._tensors, own)
        if self._layers is not None:
            found = _renumbered(found, own, _repeated(net), self._layers)
            self.report["layers"] = list(self._layers)
        ties = ties_of(net)
        taken = [name for name in own if name in found and _fits(found[name], own[name])]
        there = {ties.get(name, name) for name in own if name in found}
        missing = [name for name in own if ties.get(name, name) not in there]
        others = {
            name: f"{_describe(found[name])} instead of {_describe(own[name])}"
            for name in own
            if name in found and name not in taken
        }
        unused = [name for name in found if name not in own]
        self.report |= {
            "taken": len(taken),
            "prefix": prefix,
            "missing": missing,
            "other_shape": others,
            "unused": unused,
        }
        if not taken:
            raise InputError(
                f"init_from={self._source} has no tensor of the backbone's: it has "
                f"{_sample(self._tensors)}; the backbone has {_sample(own)}"
            )
        if self._strict and (missing or others or unused):
            alike = {_unnumbered(name) for name in own}
            has_more = self._layers is None and any(_unnumbered(name) in alike for name in unused)
            raise InputError(
                f"init_from={self._source}: {self._differences()}; with init_from_strict=false "
                "the backbone keeps its own values where the file has none that fit"
                + ("; init_layers says which of more layers it takes" if has_more else "")
            )
        self._check(found, taken, ties)
        with torch.no_grad():
            for name in taken:
                own[name].copy_(found[name])

    def describe(self) -> str:
        """Say what was taken and what was not, in one paragraph."""
        taken = f"init_from={self._source}: {self.report['taken']} tensors taken"
        if self.report["prefix"]:
            taken += f" (named {self.report['prefix']}... there)"
        rest = "and nothing else was there"
        if self._layers is not None:
            rest = f"from the layers {', '.join(map(str, self._layers))} there"
        return f"{taken}; {self._differences() or f'all of the backbone, {rest}'}"

    def _differences(self) -> str:
        report, parts = self.report, []
        if report["missing"]:
            parts.append(f"not there: {_sample(report['missing'])}")
        if report["other_shape"]:
            texts = [f"{name} {what}" for name, what in report["other_shape"].items()]
            parts.append(f"of another shape: {_sample(texts)}")
        if report["unused"]:
            parts.append(f"without a place in the backbone: {_sample(report['unused'])}")
        return "; ".join(parts)

    def _check(
        self, found: Mapping[str, Tensor], taken: Iterable[str], ties: Mapping[str, str]
    ) -> None:
        firsts: dict[str, str] = {}
        for name in taken:
            if found[name].is_floating_point() and not bool(found[name].isfinite().all()):
                raise InputError(f"init_from={self._source}: {name} has values that are not finite")
            first = firsts.setdefault(ties.get(name, name), name)
            if not torch.equal(found[name], found[first]):
                raise InputError(
                    f"init_from={self._source}: {name} and {first} differ there, and are one "
                    "tensor in the backbone"
                )


def read_initial_weights(
    config: Mapping[str, Any], folder: Path, spec: DataSpec
) -> InitialWeights | None:
    """Read what `init_from` names, on every rank.

    A run that is resumed from a checkpoint has its weights there: nothing is read.

    Args:
        config: The resolved configuration of the run, plain values.
        folder: Its run folder.
        spec: What its data are.

    Raises:
        InputError: There is no such file or run, it is damaged, or holds something else; or layers
            are named, and none.
    """
    source = config["init_from"]
    if source is None and config["init_layers"] is not None:
        raise InputError("init_layers says which layers of init_from are taken: give init_from too")
    if source is None or (config["resume"] is not None and can_be_resumed(folder)):
        return None
    path = Path(source).expanduser()
    try:
        tensors = _read(path, config, spec)
    except InputError as error:
        raise InputError(f"init_from={source}: {error}") from error
    strict, layers = config["init_from_strict"], config["init_layers"]
    return InitialWeights(source, tensors, strict=strict, layers=layers)


def _read(path: Path, config: Mapping[str, Any], spec: DataSpec) -> Mapping[str, Tensor]:
    allowed = named_code(config)
    if path.is_dir():
        weights = "artifact" if (path / ARTIFACT).is_file() else "last"
        return memfold.densify(load_model(path, weights, allow=allowed)).state_dict()
    run = path.parent.parent
    if path.name in _CHECKPOINTS and (run / HYDRA_FOLDER).is_dir():
        weights = _CHECKPOINTS[path.name]
        return memfold.densify(load_model(run, weights, allow=allowed)).state_dict()
    try:
        with open_regular(path) as opened:
            is_pickle = opened.read(1) == pickle.PROTO
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from error
    if is_pickle:
        raise InputError(
            "it is a bare pickle, as torch.save wrote before PyTorch 1.6: save its state dict with "
            "a newer one, or with safetensors"
        )
    if zipfile.is_zipfile(path):
        return _state_dict(read_plain_values(path))
    try:
        with safe_open(path, framework="pt") as file:
            is_artifact = "memfold" in (file.metadata() or {})
            names = [] if is_artifact else list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # whatever safetensors and PyTorch make of a damaged header
        raise InputError(
            "it is damaged, or neither in safetensors format nor a file of torch.save"
        ) from error
    if not is_artifact:
        return tensors
    with torch.random.fork_rng():
        net = build_backbone(config["backbone"], spec)
    return memfold.load(path, net, form="dense").state_dict()


def _state_dict(content: object) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise InputError("it holds no state dict")
    inside = (content.get(name) for name in _INSIDE)
    state = next((value for value in inside if isinstance(value, Mapping)), content)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if any(name.endswith(_COMPRESSED) for name in tensors):
        raise InputError(
            "it is of a compressed model, whose weights it cannot give: name the run folder, or a "
            "file of memfold.save"
        )
    return tensors


def _without_prefix(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Find what stands before the names, as `module.` or `net.`: what makes most of them known.

    Returns:
        The prefix, and the tensors that have it, without it; the others keep their names.

    Raises:
        InputError: A tensor is there with and without it.
    """
    prefixes = {""} | {
        name.removesuffix(known) for known in own for name in tensors if name.endswith(f".{known}")
    }
    counts = {p: sum(p + name in tensors for name in own) for p in prefixes}
    best = max(sorted(counts, key=len), key=lambda prefix: counts[prefix])
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known = name.removeprefix(best)
        if known in found:
            raise InputError(f"init_from: two tensors could be {known}: with {best} and without")
        found[known] = tensor
    return best, found


def _repeated(net: nn.Module) -> list[str]:
    try:
        return list(repeated_layers(net, None))
    except InputError as error:
        raise InputError("init_layers: the backbone has no layers that are alike") from error


def _renumbered(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    paths: Sequence[str],
    layers: Sequence[int],
) -> dict[str, Tensor]:
    """Give repeated layers the names of others.

    Args:
        tensors: By state-dict name.
        own: The backbone's.
        paths: Of the backbone's repeated layers, which end in numbers.
        layers: See `InitialWeights`.

    Raises:
        InputError: There are more or fewer of them than paths, or one is not there, or has other
            tensors.
    """
    if len(layers) != len(paths):
        raise InputError(
            f"init_layers names {len(layers)} layers, one for each of the {len(paths)} repeated "
            f"layers of the backbone ({_sample(paths)}) is needed"
        )
    stem, _, first = paths[0].rpartition(".")
    if not first.isdecimal():
        raise InputError(f"init_layers wants layers that are numbered, not {_sample(paths)}")
    there, like = _numbered(tensors, stem), _shapes(_numbered(own, stem)[int(first)])
    numbers = [number for number, layer in sorted(there.items()) if _shapes(layer) == like]
    if numbers != [*range(int(first), int(first) + len(numbers))]:
        raise InputError(
            f"init_layers counts layers without a gap, those like the backbone's are numbered "
            f"{', '.join(map(str, numbers))} there: one is missing, or has other tensors"
        )
    alike = [there[number] for number in numbers]
    if max(layers) >= len(alike):
        raise InputError(
            f"init_layers names layer {max(layers)}, and there are {len(alike)} layers like those "
            "of the backbone, from 0 on"
        )
    repeated = {id(tensor) for layer in alike for tensor in layer.values()}
    found = {name: tensor for name, tensor in tensors.items() if id(tensor) not in repeated}
    for path, number in zip(paths, layers, strict=True):
        found |= {path + rest: tensor for rest, tensor in alike[number].items()}
    return found


def _numbered(tensors: Mapping[str, Tensor], stem: str) -> Mapping[int, dict[str, Tensor]]:
    """Return what stands behind the numbers that follow `stem`: number -> `.name` -> tensor."""
    pattern = re.compile(rf"{re.escape(f'{stem}.' if stem else '')}(\d+)(\..*)", re.DOTALL)
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is not None:
            found[int(match[1])][match[2]] = tensor
    return found


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _shapes(layer: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in layer.items()}


def _fits(found: Tensor, own: Tensor) -> bool:
    are_alike = found.is_floating_point() == own.is_floating_point()
    return found.shape == own.shape and are_alike and torch.can_cast(found.dtype, own.dtype)


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} "
    return f"{kind}{tuple(tensor.shape)}"


def _sample(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more or "none"
