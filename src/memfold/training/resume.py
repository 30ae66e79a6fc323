"""Continue a run: its overrides before Hydra starts, its checkpoint before Lightning does."""

import pickle
import re
import shlex
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

from memfold.errors import InputError
from memfold.files import open_regular
from memfold.training.checkpoint_contents import check_kinds, check_resumable
from memfold.training.checks import GROUPS
from memfold.training.recorded import is_setting, read_overrides
from memfold.training.run_folder import refuse_odd_files

__all__ = [
    "StartingPoint",
    "expand_arguments",
    "is_override",
    "quote_value",
    "read_checkpoint",
    "resume_command",
]


@dataclass(frozen=True)
class StartingPoint:
    """Where training starts."""

    checkpoint: Path | None = None
    """The checkpoint to resume from; `None`: the beginning."""
    step: int = 0
    """Optimizer steps done before."""
    num_epochs: int = 0
    """Epochs done before."""
    teacher: str | None = None
    """Fingerprint of the teacher that the run learns from; `None` when it has none."""
    total_batch: int | None = None
    """Samples in a batch of all processes together."""
    round: int = 0
    """The round that the checkpoint is of."""
    max_epochs: int | None = None
    """Epochs of every round, where a run has several; they cannot change."""
    is_new_round: bool = False
    """Whether a later round starts here, with nothing of its own logged or saved yet."""


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Add to a command line with `resume=RUN` what the run was started with.

    Flags come first in the result, which saves the user from Hydra's refusal of a flag that
    stands between two overrides.

    The run's own overrides come first, without those that are given anew; those that could do more
    than set a value must be, for the folder may be somebody else's. Expanding twice gives
    the same as expanding once, because Lightning starts its child processes with the expanded
    command line, which goes through here again.

    Args:
        arguments: The command line after the program's name.

    Raises:
        InputError: `resume` does not name one run folder, the folder would decide which code runs
            or where it writes, or a group is null.
        OverrideParseException: Hydra cannot read an override.
    """
    flags = [text for text in arguments if not is_override(text)]
    given_texts = [text for text in arguments if is_override(text)]
    given = OverridesParser.create().parse_overrides(given_texts)
    for override in given:  # Hydra answers null with a traceback
        is_null = override.value() is None and not override.is_delete()
        if is_null and override.key_or_group in GROUPS:
            raise InputError(
                f"{override.input_line}: one of the choices that --help lists is needed"
            )
    folder = _run_folder(given, in_sweep="-m" in arguments or "--multirun" in arguments)
    if folder is None:
        return [*flags, *given_texts]
    try:
        original = read_overrides(folder)
    except InputError as error:
        raise InputError(f"resume={folder} is no run folder: {error}") from error
    refuse_odd_files(folder)
    kept = [override for override in original if not _is_given_anew(override, given)]
    unsafe = _texts(override for override in kept if not is_setting(override))
    if unsafe:
        raise InputError(
            f"resume={folder}: a run folder may neither name code nor places outside of it, but "
            f"it was started with {', '.join(unsafe)}; if you trust that, give it again: "
            f"{shlex.join(unsafe)}"
        )
    # The folder's own .hydra stays until the checkpoint has been accepted (see training.job).
    extra = [f"hydra.run.dir={quote_value(str(folder))}", "hydra.output_subdir=null"]
    extra = [text for text in extra if text not in given_texts]
    return [*flags, *_texts(kept), *given_texts, *extra]


def quote_value(text: str) -> str:
    """Write `text` so that Hydra reads it as one string, whatever characters it has."""
    return QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes()


def resume_command(folder: Path) -> str:
    """Return what to type, in a shell, to go on with the run in `folder`."""
    is_plain = re.fullmatch(r"[\w./+-]+", str(folder)) is not None
    value = str(folder) if is_plain else quote_value(str(folder))
    again: list[str] = []
    with suppress(InputError):
        again = _texts(o for o in read_overrides(folder) if not is_setting(o))
    return shlex.join(["python", "train.py", f"resume={value}", *again])


def read_checkpoint(
    path: Path,
    expected: Mapping[str, object],
    resizable: Collection[str] = (),
    optional: Collection[str] = (),
    *,
    resumes: bool = False,
) -> StartingPoint:
    """Check that the checkpoint at `path` is of the module with these tensors.

    Args:
        path: An existing file.
        expected: The state dict of the module that is to be resumed: name -> tensor.
        resizable: Names of tensors whose shape the checkpoint decides.
        optional: Names of tensors that checkpoints of older versions do not have.
        resumes: Whether Lightning is to go on from it, which takes more than the tensors.

    Returns:
        The checkpoint and how far it is.

    Raises:
        InputError: The file is truncated or corrupt, holds pickled objects, lacks a part, or
            belongs to another model.
    """
    checkpoint = _read_plain_values(path)
    if resumes:
        check_resumable(path, checkpoint)
    found = checkpoint["state_dict"]
    expected = {k: v for k, v in expected.items() if k in found or k not in optional}
    for name in sorted(expected.keys() ^ found.keys()):
        state = "lacks" if name in expected else "has the additional"
        raise InputError(
            f"resume: {path} belongs to another model: it {state} tensor {name}; "
            "resume with the backbone and compression that the run was started with"
        )
    for name, tensor in expected.items():
        shapes = [tuple(getattr(value, "shape", ())) for value in (found[name], tensor)]
        if shapes[0] != shapes[1] and name not in resizable:
            raise InputError(
                f"resume: {path} belongs to another model: {name} has shape {shapes[0]}, "
                f"this model needs {shapes[1]}"
            )
    place = checkpoint.get("round", {})
    # Checkpoints are written at the end of an epoch, before Lightning counts it.
    return StartingPoint(
        path,
        int(checkpoint["global_step"]),
        int(checkpoint["epoch"]) + 1,
        checkpoint.get("teacher"),
        _total_batch(checkpoint),
        place.get("number", 0),
        place.get("max_epochs"),
    )


def _total_batch(checkpoint: Mapping[str, Any]) -> int | None:
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    loaders = loop.get("combined_loader", [])
    return loaders[0].get("global_batch_size") if loaders else None


def _read_plain_values(path: Path) -> dict[str, Any]:
    import torch

    try:
        with open_regular(path) as file:
            if file.read(1) == pickle.PROTO:
                raise pickle.UnpicklingError
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("compressed, which PyTorch's files are not")
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"resume: {path} holds pickled Python objects, which could run code; "
            "only checkpoints of tensors and plain values are loaded"
        ) from error
    except Exception as error:  # whatever zipfile and PyTorch make of a damaged file
        raise InputError(
            f"resume: {path} is truncated, damaged or no checkpoint; start a new run"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or not {"state_dict", "global_step", "epoch"} <= checkpoint.keys()
    ):
        raise InputError(f"resume: {path} is no checkpoint of a training run")
    check_kinds(path, checkpoint)
    return checkpoint


def is_override(argument: str) -> bool:
    """Tell an override (key=value, ~key) from a flag of Hydra's or the value of one."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _texts(overrides: Iterable[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _run_folder(given: Sequence[Override], *, in_sweep: bool) -> Path | None:
    values = [override for override in given if override.key_or_group == "resume"]
    if not values or values[-1].value() is None:
        return None
    resume = values[-1]
    if in_sweep or resume.is_sweep_override():
        raise InputError(f"{resume.input_line}: one run is resumed at a time, without -m")
    folder = _path(resume)
    if not folder.is_dir():
        raise InputError(f"resume={folder}: there is no such folder; give that of an earlier run")
    for override in given:
        if override.key_or_group == "hydra.run.dir":
            other = _path(override)
            if not other.is_dir() or not other.samefile(folder):
                raise InputError(
                    f"resume={folder} continues in that folder; hydra.run.dir={other} is another"
                )
    return folder


def _path(override: Override) -> Path:
    return Path(str(override.value()).replace(r"\${", "${"))  # OmegaConf's escape


def _is_given_anew(original: Override, given: Sequence[Override]) -> bool:
    """Tell whether `original` has to give way; `+key=1` stays, for a later `key=2` needs it."""
    if original.key_or_group == "resume":
        return True
    same = [g for g in given if g.key_or_group == original.key_or_group]
    if original.is_add() and "." in original.key_or_group:
        same = [g for g in same if g.is_add()]
    return bool(same)
