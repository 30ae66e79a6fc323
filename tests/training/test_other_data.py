"""Text, tables and image folders: a run that was ended and resumed, or that has two ranks."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import memfold
from memfold.errors import InputError
from memfold.training import run
from memfold.training.build import build
from training.jobs import compose_job
from training.jobs_in_processes import output_of, run_job
from training.rank_jobs import train_in_two_ranks
from training.run_contents import differences, state

KINDS = ("text", "table", "image_folder")
STRATEGIES = {
    "stable_rps": ("compression=stable_rps", "ratio=0.3"),
    "rigl": ("compression=rigl", "ratio=0.3", "compression.update_every=3"),
}
COMMON = ("logger=csv", "~callbacks.progress_bar", "trainer.max_epochs=2", "optimizer=adamw")
NETWORK = ("backbone.width=8", "backbone.depth=1", "backbone.dropout=0.1")
# Uneven splits: of two ranks one evaluates more than the other. Dropout draws in every step.
JOBS = {
    "text": ("data.length=16", "backbone=gpt"),
    "table": ("data=breast_cancer", "data.val_fraction=0.1", "backbone=table_transformer"),
    "image_folder": (
        *("data.val_fraction=0.2", "data.test_fraction=0.2", "data.crop_padding=1"),
        *("data.horizontal_flip=true", "backbone=vit"),
    ),
}
BATCH_SIZES = {"text": 16, "table": 64, "image_folder": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2,800 bytes, and a folder of 43 images."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("the quick brown fox jumps\n" * 110)
    for number in range(40):
        (folder / f"{number}.txt").write_text("the lazy dog\n" * (1 + 7 * number % 11))
    generator = np.random.default_rng(0)
    for number in range(43):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def job(kind: str, files: Path) -> list[str]:
    where = {
        "text": ("data=text", f"data.files=[{files}/text.txt]"),
        "table": (),
        "image_folder": (
            *("data=image_folder", f"data.folder={files}/images"),
            f"data.root={files}/cache",
        ),
    }
    return [*where[kind], *JOBS[kind], *NETWORK, *COMMON]


def refuse_differences(kind: str, files: Path, folder: Path, ending: str, strategy: str) -> None:
    overrides = [*job(kind, files), "trainer=cpu", *STRATEGIES[strategy]]
    overrides += [f"data.batch_size={BATCH_SIZES[kind]}"]
    overrides += ["+callbacks.last_checkpoint.every_n_train_steps=2"]
    end = {"_target_": "training.signals.SignalAt", "hook": "on_train_batch_end", "signal": ending}
    ended = [f"+callbacks.end.{key}={value}" for key, value in (end | {"number": 9}).items()]
    whole = run(compose_job(folder / "whole", *overrides))
    cut = folder / "cut"
    status = run_job(cut, *overrides, *ended)
    # SIGTERM ends it after the step, when it has saved.
    assert status == (-signal.SIGKILL if ending == "SIGKILL" else 128 + signal.SIGTERM), output_of(
        cut
    )
    step = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step == (8 if ending == "SIGKILL" else 9)
    resumed = run(compose_job(cut, *overrides, f"resume={cut}"))
    assert not differences(cut, folder / "whole")
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("kind", "ending"), [("text", "SIGTERM"), ("table", "SIGKILL"), ("image_folder", "SIGTERM")]
)
def test_a_run_that_was_ended_is_the_uninterrupted_one(
    kind: str, ending: str, files: Path, tmp_path: Path
) -> None:
    refuse_differences(kind, files, tmp_path, ending, "stable_rps")


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_any_strategy_that_was_ended_is_the_uninterrupted_one(
    kind: str, ending: str, strategy: str, files: Path, tmp_path: Path
) -> None:
    refuse_differences(kind, files, tmp_path, ending, strategy)


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.ddp
def test_two_ranks_end_with_the_numbers_of_one(files: Path, tmp_path: Path) -> None:
    jobs = {kind: [*job(kind, files), *STRATEGIES["stable_rps"]] for kind in KINDS}
    documents = ",".join(f"{files}/{number}.txt" for number in range(40))
    jobs["text"] += [f"data.files=[{documents}]", "data.separate_documents=true"]
    for overrides in jobs.values():  # ranks draw different numbers
        overrides += ["backbone.dropout=0"]
    weights = build(compose_job(tmp_path, *jobs["table"], "seed=7"), tmp_path).net
    torch.save(memfold.densify(weights).state_dict(), tmp_path / "weights.pt")
    least = "compression.initial_values=least_squares"
    jobs["table"] += [f"init_from={tmp_path}/weights.pt", least]
    halves = {
        kind: [*given, f"data.batch_size={BATCH_SIZES[kind] // 2}", "trainer=ddp_cpu"]
        for kind, given in jobs.items()
    }
    train_in_two_ranks(tmp_path, halves)
    for kind, given in jobs.items():
        alone = tmp_path / "alone" / kind
        size = f"data.batch_size={BATCH_SIZES[kind]}"
        one = run(compose_job(alone, *given, size, "trainer=cpu"))["metrics"]
        two = metrics_of(tmp_path / kind)
        assert two.keys() == one.keys()
        assert two == pytest.approx(one, rel=1e-4), kind
        weights, expected = state(tmp_path / kind), state(alone)
        for key, tensor in expected.items():
            # Sums in another order, in single precision.
            torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-5)


CHANGES = {
    "text": lambda files: (files / "text.txt").write_text("the quick brown fox humps\n" * 110),
    "image_folder": lambda files: (files / "images" / "a").rename(files / "images" / "c"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_is_not_resumed_on_other_data(kind: str, files: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(files, own)
    overrides = [*job(kind, own), "trainer=cpu", *STRATEGIES["stable_rps"]]
    overrides += [f"data.batch_size={BATCH_SIZES[kind]}"]
    folder = tmp_path / "run"
    run(compose_job(folder, *overrides, "trainer.max_epochs=1"))
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    CHANGES[kind](own)
    with pytest.raises(InputError, match=f"files of data={kind} have changed since it began"):
        run(compose_job(folder, *overrides, f"resume={folder}"))
    now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in kept if kept[path] != now[path]} <= {"train.log", "metrics.csv"}
