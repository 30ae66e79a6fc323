"""train.py as a user runs it: exit statuses, one-line errors, folders left alone."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import memfold
from memfold import train_command
from memfold.training.user_errors import describe_error, report_error
from training.jobs import REPOSITORY, SMALL, start_training, train_forked


def composition_error(*overrides: str) -> str:
    with (
        initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"),
        pytest.raises(HydraException) as caught,
    ):
        compose("train", list(overrides))
    return describe_error(caught.value)


@pytest.mark.parametrize("group", ["compression", "backbone", "data", "trainer", "experiment"])
def test_unknown_option_lists_those_that_exist(group: str) -> None:
    message = composition_error(f"{group}=nope")
    names = sorted(file.stem for file in (REPOSITORY / "conf" / group).glob("*.yaml"))
    assert message == f"{group}=nope is unknown; available: {', '.join(names)}"


def test_unknown_key_lists_those_that_exist() -> None:
    message = composition_error("optimizer.lrr=3")
    assert message.startswith("optimizer.lrr is no key")
    assert "lr, momentum, nesterov, weight_decay" in message
    message = composition_error("ratioo=0.1")
    assert message.startswith("ratioo is no key")
    assert "ratio, resume" in message


def test_what_has_no_default_is_asked_for_all_at_once() -> None:
    files = (REPOSITORY / "conf").glob("*/*.yaml")
    lines = []
    for file in sorted(file for file in files if ": ???" in file.read_text()):
        config = OmegaConf.create({file.parent.name: OmegaConf.load(file)})
        with pytest.raises(MissingMandatoryValue) as caught:
            OmegaConf.to_container(config, throw_on_missing=True)
        lines.append(describe_error(caught.value))
    table = "data.file and data.target are missing: set data.file=... data.target=..."
    assert table in lines
    assert all(re.fullmatch(r"[\w. ]+ (is|are) missing: set [\w.= ]+", line) for line in lines)


def test_unreadable_override_is_quoted() -> None:
    message = composition_error("ratio=[1,")
    assert message.startswith("ratio=[1,: ")
    assert "\n" not in message


def test_only_rank_zero_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert report_error(ValueError("two\nlines"), with_traceback=False) == 1
        expected = "error: two lines\n" if rank == "0" else ""
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize("arguments", [["--resolve"], ["--shell-completion"]])
def test_what_hydra_says_of_its_own_flags_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr(train_command, "end_with_parent", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    @hydra.main(version_base="1.3", config_path=str(REPOSITORY / "conf"), config_name="train")
    def main(_: object) -> None:
        raise AssertionError

    assert train_command.launch(main) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_other_errors_are_no_mistakes_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train_command, "end_with_parent", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def main() -> None:
        raise ValueError("of the program")

    with pytest.raises(ValueError, match="of the program"):
        train_command.launch(main)


def test_train_script_imports_light_things_only() -> None:
    source = (REPOSITORY / "train.py").read_text()
    assert len(source.splitlines()) < 60
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert imported == {"sys", "pathlib", "hydra", "omegaconf", "memfold.train_command"}


@pytest.mark.ddp
def test_help_is_quick() -> None:
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"compression: {', '.join(memfold.strategies())}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported
    slow = {"lightning", "torchmetrics", "wandb", "sklearn", "matplotlib", "optuna", "pydantic"}
    assert not imported & (slow | {"memfold.training.job", "memfold.studies", "memfold.reporting"})


@pytest.mark.ddp
def test_mistake_is_one_line_and_leaves_a_failed_result(tmp_path: Path) -> None:
    status, _, err = train_forked(
        *SMALL, "compression=stable_rps", "ratio=1.5", f"hydra.run.dir={tmp_path}"
    )
    assert status == 1
    assert err.startswith("error: ratio must be")
    assert err.count("\n") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "failed"
    assert err == f"error: {result['error']}\n"
    assert "failed: ratio must be" in (tmp_path / "train.log").read_text()


@pytest.mark.ddp
def test_debug_trace_shows_where(tmp_path: Path) -> None:
    status, _, err = train_forked(*SMALL, "seed=-1", "debug=trace", f"hydra.run.dir={tmp_path}")
    assert status == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: seed must be")


@pytest.mark.ddp
def test_completed_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "completed"}')
    status, _, err = train_forked(*SMALL, f"hydra.run.dir={tmp_path}")
    assert status == 1
    assert err.startswith(f"error: hydra.run.dir={tmp_path} holds a completed run")
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "result.json"}


def test_interrupted_before_a_checkpoint_a_run_says_how_to_start_again(tmp_path: Path) -> None:
    assert train_command._after_interrupt(tmp_path) == (
        "interrupted (Ctrl-C) before the first checkpoint; start again with: "
        f"python train.py resume={tmp_path}"
    )


@pytest.mark.ddp
def test_interrupted_run_says_so_and_can_be_resumed(tmp_path: Path) -> None:
    process = start_training(*SMALL, "trainer.max_epochs=500", f"hydra.run.dir={tmp_path}")
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"interrupted (Ctrl-C); continue with: python train.py resume={tmp_path}\n"
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "interrupted (Ctrl-C)")
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.ddp
def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    status, _, err = train_forked(*SMALL, f"hydra.run.dir={folder}")
    assert (status, err) == (1, f"error: cannot write {folder}: Not a directory\n")


@pytest.mark.ddp
def test_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    status, _, err = train_forked(*SMALL, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    assert status == 0, err
    files = [tmp_path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    before = [file.read_bytes() for file in files]
    status, _, err = train_forked(
        f"resume={tmp_path}", "trainer.max_epochs=2", largest_file=len(before[0]) // 2
    )
    assert status == 1
    assert err.startswith(f"error: cannot write {tmp_path / 'checkpoints'}/")
    assert err.endswith(": File too large\n")
    assert err.count("\n") == 1
    assert [file.read_bytes() for file in files] == before
