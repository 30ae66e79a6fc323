"""Moves of runs that were cut off are finished by the plan that began them."""

import threading
from pathlib import Path

import pytest

from memfold.runs.locks import locked
from memfold.studies.process import Stopped
from memfold.studies.put_aside import sort_runs

NAME = "mag-0.1-s1"
PARTS = (f"{NAME}.txt", NAME, f"{NAME}.overrides.json")  # in the order in which they are moved


def parts(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def write(folder: Path, *names: str) -> None:
    for name in names:
        folder.mkdir(exist_ok=True)
        if name == NAME:
            (folder / name).mkdir()
            (folder / name / "result.json").touch()
        else:
            (folder / name).touch()


@pytest.mark.parametrize("is_wanted", [True, False])
@pytest.mark.parametrize("num_moved", [0, 1, 2, 3])
def test_a_move_that_was_cut_off_is_finished(
    num_moved: int, is_wanted: bool, tmp_path: Path
) -> None:
    runs, aside = tmp_path / "runs", tmp_path / "aside"
    source, target = (aside, runs) if is_wanted else (runs, aside)
    write(target, *PARTS[:num_moved])
    write(source, *PARTS[num_moved:])
    others = sort_runs(runs, aside, [NAME] if is_wanted else [], threading.Event())
    assert others == ([] if is_wanted else [NAME])
    assert parts(target) == set(PARTS)
    assert not parts(source)


def test_a_run_that_is_still_ending_is_not_moved(tmp_path: Path) -> None:
    runs, stop = tmp_path / "runs", threading.Event()
    write(runs, *PARTS)
    stop.set()
    with locked(runs / NAME), pytest.raises(Stopped):
        sort_runs(runs, tmp_path / "aside", [], stop)
    assert parts(runs) == set(PARTS)
