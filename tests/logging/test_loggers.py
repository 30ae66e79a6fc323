"""metrics.csv and the loggers beside it."""

import csv
from pathlib import Path

import pytest

from memfold.errors import InputError
from memfold.logging.loggers import MetricsFile, tensorboard_logger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_each_row_is_on_disk_at_once_and_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"val/acc": 0.5, "epoch": 0}, step=9)
    assert rows(tmp_path) == [{"step": "9", "epoch": "0", "val/acc": "0.5"}]
    file.log_metrics({"train/loss": 2.25, "epoch": 0}, step=9)
    file.log_metrics({"val/acc": 0.75, "epoch": 1}, step=19)
    assert rows(tmp_path) == [
        {"step": "9", "epoch": "0", "val/acc": "0.5"},
        {"step": "9", "epoch": "0", "train/loss": "2.25"},
        {"step": "19", "epoch": "1", "val/acc": "0.75"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_columns_stand_by_group_and_within_it_as_they_were_logged(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"val/acc": 0.5, "density/stem": 0.1, "density/head": 0.2}, step=1)
    file.log_metrics({"memory/b": 1, "val/acc": 0.5, "memory/a": 2}, step=2)
    columns = "step,epoch,density/stem,density/head,memory/b,memory/a,val/acc"
    assert (tmp_path / "metrics.csv").read_text().startswith(columns + "\n")
    resumed = MetricsFile(tmp_path, keep_before_step=2)
    resumed.log_metrics({"memory/b": 1, "val/acc": 0.5, "memory/a": 2}, step=2)
    assert (tmp_path / "metrics.csv").read_text().startswith(columns + "\n")


def test_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for epoch in range(4):
        file.log_metrics({"val/acc": epoch / 8, "epoch": epoch}, step=10 * epoch + 9)
    with (tmp_path / "metrics.csv").open("a") as text:
        text.write("4")  # cut short by a kill
    resumed = MetricsFile(tmp_path, keep_before_step=20)
    resumed.log_metrics({"val/acc": 0.25, "epoch": 2}, step=29)
    assert [row["step"] for row in rows(tmp_path)] == ["9", "19", "29"]


def test_new_run_starts_a_new_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path).log_metrics({"val/acc": 0.5}, step=9)
    MetricsFile(tmp_path).log_metrics({"val/acc": 0.25}, step=1)
    assert rows(tmp_path) == [{"step": "1", "val/acc": "0.25"}]


def test_tensorboard_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr("memfold.logging.loggers._TensorBoardFiles", missing)
    with pytest.raises(InputError, match=r"'\.\[tensorboard\]'"):
        tensorboard_logger(tmp_path, "name", [])


def test_a_row_is_found_by_its_step_and_columns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    assert not file.has_row(9, ["train/loss"])
    file.log_metrics({"val/acc": 0.5, "epoch": 0}, step=9)
    file.log_metrics({"train/loss": 0.5, "epoch": 0}, step=19)
    assert file.has_row(19, ["train/loss", "epoch"])
    assert not file.has_row(9, ["train/loss"])
    assert not file.has_row(19, ["train/loss", "lr"])
