"""The lines of a sweep that say what to do next: upload all W&B runs, compare the jobs."""

import json
import shlex
import subprocess
from pathlib import Path

from memfold.runs.sweep import JobNote
from memfold.studies.sweep_report import report_command, upload_command


def job(sweep: Path, number: int, folder: str, *, offline: bool, synced: bool = False) -> Path:
    """Leave the note of a job and what W&B leaves."""
    overrides = [f"seed={number}"]
    JobNote(number=number, folder=folder, overrides=overrides, attempt=0, seconds=1.0).note(sweep)
    kind = "offline-run" if offline else "run"
    wandb = sweep / folder / "wandb" / f"{kind}-20260101_120000-abc{number}"
    wandb.mkdir(parents=True)
    (wandb / f"run-abc{number}.wandb").touch()
    if synced:
        (wandb / f"run-abc{number}.wandb.synced").touch()
    return wandb


def paths(command: str) -> list[str]:
    """What a shell hands to `wandb sync`."""
    program, _, arguments = command.partition("sync ")
    assert program == "wandb "
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {arguments}"], capture_output=True, text=True, check=True
    )
    return shown.stdout.splitlines()


def test_one_command_uploads_the_runs_of_all_jobs(tmp_path: Path) -> None:
    sweep = tmp_path / "a sweep's folder"
    runs = [job(sweep, number, str(number), offline=True) for number in range(3)]
    job(sweep, 3, "3", offline=False)
    command = upload_command(sweep)
    assert command is not None
    assert "\n" not in command
    assert sorted(paths(command)) == [str(run) for run in runs]


def test_jobs_in_folders_of_several_depths_are_all_reached(tmp_path: Path) -> None:
    runs = [job(tmp_path, 0, "0", offline=True), job(tmp_path, 1, "snip/1", offline=True)]
    command = upload_command(tmp_path)
    assert command is not None
    assert sorted(paths(command)) == sorted(str(run) for run in runs)


def test_nothing_is_said_where_nothing_waits(tmp_path: Path) -> None:
    job(tmp_path, 0, "0", offline=False)
    job(tmp_path, 1, "1", offline=True, synced=True)
    assert upload_command(tmp_path) is None
    job(tmp_path, 2, "2", offline=True)
    assert upload_command(tmp_path) is not None


def end(sweep: Path, number: int, status: str) -> None:
    """Leave a job that has ended."""
    job(sweep, number, str(number), offline=False)
    (sweep / str(number) / "result.json").write_text(json.dumps({"status": status}))


def test_the_report_is_offered_once_a_job_is_completed(tmp_path: Path) -> None:
    sweep, program = tmp_path / "a sweep", tmp_path / "clone" / "train.py"
    script = tmp_path / "clone" / "scripts" / "report.py"
    script.parent.mkdir(parents=True)
    script.touch()
    end(sweep, 0, "failed")
    assert report_command(sweep, program) is None
    end(sweep, 1, "completed")
    command = report_command(sweep, program)
    assert command is not None
    assert shlex.split(command) == ["python", str(script), str(sweep), "--out", f"{sweep}/report"]
    assert report_command(sweep, tmp_path / "train.py") is None  # no such script beside it
