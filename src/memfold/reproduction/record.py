"""`reproduction.json`: what a folder was started with, so that it never mixes two comparisons."""

import json
from pathlib import Path

from memfold.errors import InputError
from memfold.files import read_json
from memfold.reproduction.grid import Grid
from memfold.runs.folder import write_text_atomically

__all__ = ["refuse_other_grid", "write_record"]

_RECORD = "reproduction.json"


def refuse_other_grid(out: Path, grid: Grid) -> None:
    """Check that `grid` is what the folder `out` was started with; experiments may differ.

    Raises:
        InputError: It was another one, or the record cannot be read.
    """
    file = out / _RECORD
    try:
        before = read_json(file)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or cannot be read; choose another --out") from error
    now = grid.facts()
    if not isinstance(before, dict) or set(before) != set(now):
        raise InputError(f"{file} is damaged or cannot be read; choose another --out")
    for option, value in now.items():
        if before[option] != value:
            was = f"with {option} {before[option]}" if before[option] else f"without {option}"
            given = f"{option} {value}" if value else f"no {option}"
            raise InputError(
                f"--out {out} was started {was}, but {given} is given now; a folder keeps its "
                "comparison (only --experiments may change): choose another --out"
            )


def write_record(out: Path, grid: Grid) -> None:
    """Write what the folder is started with.

    Raises:
        InputError: It cannot be written.
    """
    write_text_atomically(out / _RECORD, json.dumps(grid.facts(), indent=2) + "\n")
