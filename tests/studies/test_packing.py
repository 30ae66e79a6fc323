"""Artifacts of completed runs in fewer bits: the bytes, and the accuracy of what was packed."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

import memfold
from memfold.backbones import MLP
from memfold.data.digits import Digits
from memfold.errors import InputError
from memfold.studies.packing import pack_runs
from memfold.studies.process import Stopped
from memfold.training import run
from training.jobs import SMALL, compose_job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for number, strategy in enumerate(("dense", "mag")):
        ratio = [] if strategy == "dense" else ["ratio=0.2"]
        overrides = [f"compression={strategy}", *ratio, "trainer.max_epochs=1"]
        run(compose_job(folder / str(number), *SMALL, *overrides))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs")


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def accuracy(file: Path, stage: str) -> float:
    data = Digits()
    data.setup("fit")
    data.setup("test")
    net = memfold.load(file, MLP(1, 8, 10)).eval()
    batches = data.val_dataloader() if stage == "val" else data.test_dataloader()
    with torch.no_grad():
        hits = [
            (net(images).argmax(1) == labels).float()
            for images, labels in map(data.on_after_batch_transfer, batches)
        ]
    return float(torch.cat(hits).mean())


def test_the_packed_file_is_measured_and_evaluated(runs: Path) -> None:
    assert pack_runs(runs, [8, 4]) == 4
    for folder in (runs / "0", runs / "1"):
        before = read(folder)
        for bits in (8, 4):
            packed = folder / "packed" / str(bits)
            result = read(packed)
            assert result["compression"] == before["compression"] | {"bits": bits}
            values = before["memory"]["value_bytes"] // 4
            blocks = values // 64
            # A bfloat16 scale for each block of 64, the last of each tensor may be shorter.
            least = values * bits // 8 + 2 * blocks
            assert least <= result["memory"]["value_bytes"] <= least + 6 * 3
            for key in ("index_bytes", "untouched_bytes", "dense_bytes"):
                assert result["memory"][key] == before["memory"][key]
            file = packed / "model.safetensors"
            assert result["memory"]["artifact_bytes"] == file.stat().st_size
            for stage in ("val", "test"):
                expected = accuracy(file, stage)
                assert result["metrics"][f"packed/{stage}/acc"] == pytest.approx(expected, abs=1e-6)
                # The run's own accuracy is still that of 32 bits.
                assert result["metrics"][f"{stage}/acc"] == before["metrics"][f"{stage}/acc"]


def test_what_is_packed_already_stays(runs: Path) -> None:
    assert pack_runs(runs, [8]) == 2
    stamp = (runs / "0" / "packed" / "8" / "result.json").stat().st_mtime_ns
    assert pack_runs(runs, [8, 4]) == 2
    assert (runs / "0" / "packed" / "8" / "result.json").stat().st_mtime_ns == stamp


def test_a_run_that_was_trained_further_is_packed_again(runs: Path) -> None:
    assert pack_runs(runs, [8]) == 2
    result = read(runs / "0")
    result["training"]["epochs"] += 1
    (runs / "0" / "result.json").write_text(json.dumps(result))
    assert pack_runs(runs, [8]) == 1
    assert read(runs / "0" / "packed" / "8")["training"] == result["training"]


def test_runs_that_are_not_completed_or_were_replaced_are_left_out(runs: Path) -> None:
    shutil.copytree(runs / "1", runs / ".replaced" / "1" / "1")
    result = read(runs / "0") | {"status": "failed"}
    (runs / "0" / "result.json").write_text(json.dumps(result))
    assert pack_runs(runs, [8]) == 1
    assert not (runs / "0" / "packed").exists()


def test_a_run_that_knows_its_bits_has_its_file(runs: Path) -> None:
    result = read(runs / "0")
    result["compression"] |= {"bits": 4, "train_bits": 4}
    (runs / "0" / "result.json").write_text(json.dumps(result))
    assert pack_runs(runs, [8]) == 1
    assert not (runs / "0" / "packed").exists()


def test_a_run_of_fewer_bits_is_refused(runs: Path) -> None:
    result = read(runs / "0")
    result["compression"]["bits"] = 8
    (runs / "0" / "result.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"was trained for artifact\.bits=8"):
        pack_runs(runs, [4])


def test_what_was_left_half_written_is_packed_again(runs: Path) -> None:
    assert pack_runs(runs, [8]) == 2
    packed = runs / "0" / "packed" / "8"
    whole = (packed / "model.safetensors").read_bytes()
    (packed / "result.json").write_text('{"status": "comp')
    (packed / "model.safetensors").write_bytes(whole[:100])
    assert pack_runs(runs, [8]) == 1
    assert (packed / "model.safetensors").read_bytes() == whole


def test_a_damaged_result_is_named(runs: Path) -> None:
    (runs / "0" / "result.json").write_text('{"status": "completed"}')
    with pytest.raises(InputError, match=r"0/result\.json is damaged: it has no compression"):
        pack_runs(runs, [8])


def test_packing_stops_when_it_is_told_to(runs: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        pack_runs(runs, [8], stop)
    assert not list(runs.rglob("packed"))
