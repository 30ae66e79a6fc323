"""Hydra callbacks: what happens before Hydra touches a folder, and after a sweep."""

import sys
from contextlib import suppress
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from memfold.errors import InputError
from memfold.training.processes import is_rank_zero
from memfold.training.run_folder import (
    LOCK,
    RESULT,
    locked,
    read_result,
    refuse_used_folder,
    writing,
)

__all__ = ["RunFolderGuard", "SweepSummary"]


class RunFolderGuard(Callback):
    """Refuse a folder that holds results, before Hydra writes its own files there.

    Hydra turns exceptions of callbacks into warnings, hence the exit.
    """

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Check `hydra.run.dir`, unless the run in it is to be resumed."""
        if config.resume is None and is_rank_zero():
            # Hydra itself reports a name that cannot be resolved.
            with suppress(OmegaConfBaseException):
                folder = Path(config.hydra.run.dir)
                _refuse((folder,), "hydra.run.dir", new=folder)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Check the job folders that exist in `hydra.sweep.dir`."""
        with suppress(OmegaConfBaseException):
            sweep = Path(config.hydra.sweep.dir)
            folders = tuple(file.parent for file in sweep.rglob(RESULT))
            _refuse(folders, "hydra.sweep.dir", new=sweep)


class SweepSummary(Callback):
    """List the jobs of a sweep when all have ended; exit with status 1 when one failed."""

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Read every `result.json` below the sweep's folder."""
        sweep = Path(config.hydra.sweep.dir)
        folders = sorted((file.parent for file in sweep.rglob(RESULT)), key=_numeric_order)
        table = Table(title=f"{len(folders)} jobs in {sweep}")
        for column in ("job", "compression", "ratio", "seed", "status", "test/acc", "stored bytes"):
            table.add_column(column)
        num_failed = 0
        for folder in folders:
            result = read_result(folder)
            num_failed += result.get("status") != "completed"
            table.add_row(
                str(folder.relative_to(sweep)),
                _text(result, "compression", "name"),
                _text(result, "compression", "ratio"),
                _text(result, "seed"),
                _text(result, "status"),
                _text(result, "metrics", "test/acc"),
                _text(result, "memory", "stored_bytes"),
            )
        Console().print(table)
        if num_failed:
            print(f"error: {num_failed} of {len(folders)} jobs failed", file=sys.stderr)
            sys.exit(1)


def _refuse(folders: tuple[Path, ...], key: str, new: Path) -> None:
    """Exit unless `new` can be made and no job runs, or left results, in `folders`."""
    try:
        with writing(new):
            new.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            if (folder / LOCK).exists():
                with locked(folder):
                    pass
            refuse_used_folder(folder, key)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _numeric_order(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdigit() else sys.maxsize, str(folder))


def _text(result: dict[str, object], *keys: str) -> str:
    value: object = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
