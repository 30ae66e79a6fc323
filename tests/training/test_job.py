"""Whole jobs in this process: the run folder, and a result in every case."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf.errors import OmegaConfBaseException

import memfold
from memfold.backbones import MLP
from memfold.data.digits import Digits
from memfold.errors import InputError
from memfold.training import compute, run
from memfold.training.build import build
from memfold.training.user_errors import describe_error
from training.jobs import SMALL, compose_job

MEMORY = {
    "dense_bytes",
    "value_bytes",
    "index_bytes",
    "untouched_bytes",
    "stored_bytes",
    "stored_ratio",
    "artifact_bytes",
    "train_state_bytes",
    "peak_bytes",
    "grad_sync_bytes",
}


def run_small(folder: Path, *overrides: str) -> dict[str, Any]:
    return run(compose_job(folder, *SMALL, "trainer.max_epochs=2", *overrides))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_completed_run_leaves_what_the_contract_names(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run_small(folder, "compression=stable_rps", "ratio=0.05", "seed=0")
    assert result == read(folder)
    assert result["status"] == "completed"
    assert result["seed"] == 0
    assert (result["backbone"], result["data"], result["task"]) == (
        "mlp",
        "digits",
        "classification",
    )
    names = {"val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "train/loss"}
    assert names <= result["metrics"].keys()
    assert result["memory"].keys() == MEMORY
    assert result["time"].keys() == {"fit_seconds", "step_seconds", "samples_per_second"}
    assert result["environment"].keys() == {
        "git_commit",
        "git_dirty",
        "python",
        "torch",
        "lightning",
        "device",
        "world_size",
    }
    assert result["environment"]["world_size"] == 1
    assert result["environment"]["device"] == "cpu"

    dense = MLP(1, 8, 10)
    num_weights = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    num_values = round(0.05 * num_weights)
    num_biases = sum(p.numel() for p in dense.parameters() if p.dim() == 1)
    assert result["compute"] == {"operations": num_weights}
    assert result["samples"] == {"train": 1293, "val": 144, "test": 360}
    assert 0.1 < result["chance"] < 0.2  # ten classes, not quite equal
    assert result["parameters"] == {
        "dense": num_weights + num_biases,
        "compressible": num_weights,
        "trained": num_values + num_biases,
    }
    assert result["compression"]["name"] == "stable_rps"
    assert result["compression"]["ratio"] == num_values / num_weights
    assert result["compression"]["requested_ratio"] == 0.05
    assert result["compression"]["gradient_scale"] == "length"
    artifact = folder / "model.safetensors"
    assert result["memory"]["artifact_bytes"] == artifact.stat().st_size
    # Values, gradients and momentum, and what the strategy keeps beside them: a byte for the sign
    # of each row and each column, four for each partition, and a few numbers.
    trained_bytes = 4 * (num_values + num_biases)
    signs = sum(sum(p.shape) for p in dense.parameters() if p.dim() > 1)
    partitions = -(-num_weights // num_values)
    rest = result["memory"]["train_state_bytes"] - 3 * trained_bytes - signs - 4 * partitions
    assert 0 <= rest <= 80

    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows if row["val/acc"]] == ["0", "1"]
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["0", "1"]
    assert len([row for row in rows if row["test/acc"]]) == 1
    for key in MEMORY:
        assert [row for row in rows if row[f"memory/{key}"]], key

    for name in ("last", "best"):
        saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert any(key.startswith("net.") for key in saved["state_dict"])
    assert sorted(path.name for path in folder.iterdir()) == [
        ".hydra",
        ".lock",
        "checkpoints",
        "metrics.csv",
        "model.safetensors",
        "result.json",
    ]


def test_operations_are_those_for_samples_of_the_training_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    count = compute.forward_operations
    monkeypatch.setattr(
        compute, "forward_operations", lambda net, x: seen.append(x) or count(net, x)
    )
    run(compose_job(tmp_path, *SMALL, "debug=fast"))
    data = Digits()
    data.setup("fit")
    (example,) = seen
    images = torch.cat([images for images, _ in data.scoring_batches(0)])
    assert len(example) == 8
    assert all((images == image).flatten(1).all(1).any() for image in example)


def test_artifact_in_plain_pytorch_has_the_tested_accuracy(tmp_path: Path) -> None:
    result = run_small(tmp_path, "compression=roast", "ratio=0.1", "trainer.max_epochs=4")
    model = memfold.load(tmp_path / "model.safetensors", MLP(1, 8, 10)).eval()
    data = Digits()
    data.setup("test")
    correct, total = 0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, labels = data.on_after_batch_transfer(batch)
            correct += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    assert result["metrics"]["test/acc"] == pytest.approx(correct / total)


def test_initial_values_depend_on_the_seed_alone(tmp_path: Path) -> None:
    weights = []
    for seed, overrides in (
        (0, ("data.batch_size=32", "optimizer=adamw")),
        (0, ("data.batch_size=64", "scheduler=one_cycle")),
        (1, ()),
    ):
        cfg = compose_job(tmp_path, *SMALL, f"seed={seed}", *overrides)
        weights.append(build(cfg, tmp_path).net.state_dict())
    same = [torch.equal(a, b) for a, b in zip(*(w.values() for w in weights[:2]), strict=True)]
    assert all(same)
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_small(tmp_path, "compression=stable_rps", "ratio=0")
    result = read(tmp_path)
    assert result["status"] == "failed"
    assert "ratio must be" in result["error"]
    assert result["compression"]["ratio"] == 0
    assert result["backbone"] == "mlp"


def test_diverging_run_fails_and_keeps_no_checkpoint_of_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training loss is nan at step 3 .* take optimizer=adamw"):
        run_small(tmp_path, "backbone=custom", "backbone.target=training.networks.Infinite")
    assert read(tmp_path)["status"] == "failed"
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_bugs_are_recorded_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr("memfold.training.job.build", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_small(tmp_path)
    result = read(tmp_path)
    assert result["error"] == "RuntimeError: a bug in two lines"
    for key in ("epochs", "metrics", "parameters", "memory", "time"):
        assert result[key] is None
    assert result["environment"]["device"] is result["environment"]["world_size"] is None


def test_earlier_results_stay(tmp_path: Path) -> None:
    run_small(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a completed run"):
        run_small(tmp_path)
    with pytest.raises(InputError, match=r"trainer\.max_epochs=2 must be above 2"):
        run_small(tmp_path, f"resume={tmp_path}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_completed_run_can_be_trained_further(tmp_path: Path) -> None:
    first = run_small(tmp_path, "trainer.max_epochs=1")
    second = run_small(tmp_path, "trainer.max_epochs=3", f"resume={tmp_path}")
    assert read(tmp_path) == second
    assert second["metrics"]["train/loss"] < first["metrics"]["train/loss"]
    assert "trainer.max_epochs=3" in (tmp_path / ".hydra" / "overrides.yaml").read_text()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file) if row["val/acc"]]
    assert epochs == ["0", "1", "2"]


def test_resume_without_a_checkpoint_starts_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compose_job(tmp_path, *SMALL, "trainer.max_epochs=2", "debug=fast")
    result = run_small(tmp_path, "debug=fast", f"resume={tmp_path}")
    assert result["status"] == "completed"
    assert "starts from the beginning" in caplog.text


def test_best_weights_are_tested_and_saved_on_request(tmp_path: Path) -> None:
    result = run_small(
        tmp_path,
        "test_checkpoint=best",
        "scheduler=multistep",
        "scheduler.gamma=1.0",
        "optimizer.lr=0.3",
        "optimizer.momentum=0.0",
        "trainer.max_epochs=3",
    )
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    saved = memfold.load(tmp_path / "model.safetensors", MLP(1, 8, 10)).state_dict()
    for name, tensor in saved.items():
        assert torch.equal(best[f"net.{name}"], tensor), name
    assert result["test_checkpoint"] == "best"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("ratio=0.1", "budget_bytes=9"), "both given"),
        (("seed=-1",), "seed must be"),
        (("seed=true",), "seed must be"),
        (("trainer.max_epochs=0",), r"trainer\.max_epochs"),
        (("test_checkpoint=first",), "test_checkpoint must be last or best"),
        (("trainer.precision=8",), r"trainer\.precision must be 64, 32, 16, .* or null, got 8"),
        (("optimizer.nesterov=maybe",), r"optimizer\.nesterov must be true or false, got 'maybe'"),
        (("optimizer=adamw", "optimizer.betas=[0.9]"), r"optimizer\.betas must be a list of 2"),
        (("data._target_=memfold.backbones.MLP",), r"data\._target_=.* gives memfold's DataModule"),
        (("+trainer.val_check_interval=1000",), "trainer: .*val_check_interval"),
        (("+trainer.max_time=00:00:00:00",), "stopped the run before its first step"),
        (("optimizer.lr=-1",), r"optimizer\.lr must be a number of at least 0, got -1"),
        (("optimizer.lr=abc",), r"optimizer\.lr must be a number of at least 0, got 'abc'"),
        (("~optimizer",), "optimizer must be one of"),
        (("ratio=[0.1,0.2]",), r"ratio must be .*\[0\.1, 0\.2\]"),
        (("seed=[1,2]",), r"seed must be .*\[1, 2\]"),
        (("ratio=${nothing}",), "nothing"),
        (("task.label_smoothing=abc",), r"task\.label_smoothing must be .*'abc'"),
        (("scheduler=multistep", "scheduler.milestones=5"), r"milestones must be a list .* 5"),
        (("+data.foo=1",), r"data\.foo is no option; options: root, batch_size"),
        (("+foo=1",), "foo is no key of the configuration; keys: backbone, "),
        (("trainer.limit_train_batches=0",), r"trainer\.limit_train_batches must be .* 0"),
        (("trainer.limit_train_batches=0.0001",), "trainer: "),
        (("trainer.gradient_clip_val=0",), r"trainer\.gradient_clip_val must be .* 0"),
        (("trainer.accumulate_grad_batches=1.5",), r"accumulate_grad_batches must be .* 1\.5"),
        (("backbone._target_=memfold.backbones.Nope",), "backbone: .*Nope"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises((InputError, OmegaConfBaseException), match=message) as caught:
        run_small(tmp_path, *overrides)
    assert "\n" not in describe_error(caught.value)
    assert read(tmp_path)["status"] == "failed"


def test_precision_clipping_and_accumulation_work_together(tmp_path: Path) -> None:
    result = run_small(
        tmp_path,
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1.0",
        "trainer.accumulate_grad_batches=3",
        "task.label_smoothing=0.1",
        "data.batch_size=50",
    )
    assert result["status"] == "completed"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-true", torch.bfloat16), ("64-true", torch.float64), ("16-true", torch.float16)],
)
@pytest.mark.parametrize("strategy", ["dense", "stable_rps", "mag"])
def test_networks_in_another_precision_are_trained_and_saved_in_it(
    precision: str, dtype: torch.dtype, strategy: str, tmp_path: Path
) -> None:
    names = (f"trainer.precision={precision}", f"compression={strategy}", "optimizer.lr=0.01")
    result = run_small(tmp_path, *names, "ratio=0.1" if strategy != "dense" else "ratio=null")
    assert result["metrics"]["train/loss"] < 3
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    biases = [value for key, value in saved.items() if key.endswith(".bias")]
    assert biases
    assert {bias.dtype for bias in biases} == {dtype}
