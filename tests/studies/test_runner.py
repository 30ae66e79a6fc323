"""Runs of others: one that is about to be completed, and one that was started without a study."""

import json
import threading
import time
from pathlib import Path

import pytest

from memfold.runs.locks import wait_for_lock
from memfold.studies.runner import RunFailed, Runner


def test_what_another_process_completes_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "run.overrides.json").write_text('["seed=1"]')
    completed = {"status": "completed", "seed": 1}
    is_held, started, found = threading.Event(), threading.Event(), []

    def other() -> None:
        with wait_for_lock(folder / ".lock"):
            is_held.set()
            started.wait()
            time.sleep(0.3)  # it waits for the lock by now
            (folder / "result.json").write_text(json.dumps(completed))

    # The program does not exist: a run that is started fails.
    runner = Runner(tmp_path / "none.py")
    launched = threading.Thread(target=lambda: found.append(runner.run(["seed=1"], folder)))
    thread = threading.Thread(target=other)
    thread.start()
    is_held.wait()
    launched.start()
    started.set()
    thread.join()
    launched.join()
    assert found == [completed]


def test_a_run_that_no_study_has_started_is_taken_for_what_it_was_started_with(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n- ratio=0.1\n- resume=run\n")
    completed = {"status": "completed", "seed": 1}
    (folder / "result.json").write_text(json.dumps(completed))
    runner = Runner(tmp_path / "none.py")
    assert runner.run(["seed=1", "ratio=0.1"], folder) == completed
    with pytest.raises(RunFailed, match="status 2"):  # the program does not exist
        runner.run(["seed=1", "ratio=0.2"], folder)
    assert not (folder / "result.json").exists()
