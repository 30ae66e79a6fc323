"""Starting, continuing and ending a W&B run."""

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import Logger

from memfold.errors import InputError
from memfold.logging.wandb_run import close_wandb, wandb_logger
from training.jobs import REPOSITORY
from training.jobs_in_processes import output_of, run_job
from training.run_contents import SENSITIVE, STRATEGIES, differences
from wandb_processes import forget_wandb


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """W&B without a key; returns the netrc file it would read."""
    forget_wandb(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def start(folder: Path, run_name: str, tags: list[str], **options: Any) -> Logger:
    """Start a run with the options of `logger=wandb`, but for some."""
    defaults = yaml.safe_load((REPOSITORY / "conf" / "logger" / "wandb.yaml").read_text())
    del defaults["_target_"]
    return wandb_logger(folder, run_name, **{**defaults, "tags": tags, **options})


def started_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the mode that `wandb_logger` chooses, without starting anything."""
    modes = []

    def init(**options: object) -> None:
        modes.append(options["mode"])
        raise wandb.Error("stopped by the test")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(InputError, match=r"stopped by the test.*logger\.mode=offline"):
        start(folder, "name", [])
    return modes[0]


def test_wandb_is_online_only_with_a_key(
    no_credentials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started_mode(tmp_path, monkeypatch) == "offline"
    no_credentials.write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
    no_credentials.chmod(0o600)
    assert started_mode(tmp_path, monkeypatch) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert started_mode(tmp_path, monkeypatch) == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    no_credentials.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    assert started_mode(tmp_path, monkeypatch) == "online"


def test_unknown_wandb_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logger\.mode must be one of online, offline"):
        start(tmp_path, "name", [], mode="of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_artifact": "nope"}, "logger.log_artifact must be true or false, got 'nope'"),
        ({"save_code": "nope"}, "logger=wandb cannot start: "),
        ({"tags": [""]}, "logger.tags must have 1 to 64 characters"),
        ({"project": "a/b"}, "logger=wandb cannot start: "),
    ],
)
def test_wrong_options_are_named_in_one_line(
    options: dict[str, Any], message: str, no_credentials: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        start(tmp_path, "name", **{"tags": [], **options})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_numbers_may_be_names(no_credentials: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": 3, "group": 4}  # logger.name=3 is a number to Hydra
    start(tmp_path, "name", [], **options)
    assert wandb.run is not None
    assert (wandb.run.name, wandb.run.group) == ("3", "4")
    close_wandb(failed=False)


def test_offline_run_is_named_and_continued(no_credentials: Path, tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = start(tmp_path, "mlp-dense-s1", ["dense"])
        run = wandb.run
        assert run is not None
        ids.append(run.id)
        assert (run.name, run.project, run.tags) == ("mlp-dense-s1", "memfold", ("dense",))
        logger.log_metrics({"val/acc": 0.5}, step=3)
        assert run.summary["trainer/global_step"] == 3  # the x-axis of all that is logged
        assert "WANDB_MODE" not in os.environ
        command = close_wandb(failed=False)
        assert wandb.run is None
        assert command is not None
        folders = [Path(path) for path in shlex.split(command)[2:]]
        assert folders == sorted((tmp_path / "wandb").glob("offline-run-*"))
        assert all(list(folder.glob("*.wandb")) for folder in folders)
        time.sleep(1.1)  # W&B names a folder after the second in which the run starts
    assert len(folders) == 2
    assert ids[0] == ids[1]
    assert close_wandb(failed=False) is None


def test_an_id_may_have_dashes(no_credentials: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb" / "offline-run-20260101_120000-my-run-3").mkdir(parents=True)
    start(tmp_path, "mlp-dense-s1", [])
    assert wandb.run is not None
    assert wandb.run.id == "my-run-3"
    close_wandb(failed=False)


@pytest.mark.slow
@pytest.mark.ddp
def test_killed_run_goes_on_under_its_id_and_loses_no_metric(
    no_credentials: Path, tmp_path: Path
) -> None:
    """W&B writes in blocks, so that a kill loses what it had not written; `metrics.csv` has it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = (*SENSITIVE, *STRATEGIES["dense"])
    offline = ("logger=wandb", "logger.mode=offline")
    killer = (
        "+callbacks.killer._target_=training.signals.SignalAt",
        "+callbacks.killer.signal=SIGKILL",
        "+callbacks.killer.hook=on_train_batch_end",
        "+callbacks.killer.number=25",
    )
    assert run_job(whole, *job) == 0
    assert run_job(killed, *job, *offline, *killer) == -signal.SIGKILL
    assert run_job(killed, *job, *offline, f"resume={killed}") == 0, output_of(killed)
    assert not differences(killed, whole)
    runs = list((killed / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({folder.name.rpartition("-")[2] for folder in runs}) == 1
    # Left to itself, Lightning would name the folder of the checkpoints after the W&B run.
    assert {path.parent for path in killed.rglob("*.ckpt")} == {killed / "checkpoints"}
    assert "anonymous" not in output_of(killed)
