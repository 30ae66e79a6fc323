"""Two processes train as one does."""

import json
from pathlib import Path

import pytest
import torch

from memfold.training import run
from training.jobs import SMALL, compose_job, train


@pytest.mark.ddp
def test_two_processes_with_half_the_batch_are_one(tmp_path: Path) -> None:
    common = [*SMALL, "compression=stable_rps", "ratio=0.05", "trainer.max_epochs=3"]
    one = run(compose_job(tmp_path / "one", *common, "data.batch_size=100"))
    folder = tmp_path / "two"
    status, _, err = train(
        *(text for text in common if text != "trainer=cpu"),
        "trainer=ddp_cpu",
        "data.batch_size=50",
        f"hydra.run.dir={folder}",
    )
    assert status == 0, err
    two = json.loads((folder / "result.json").read_text())
    assert two["environment"]["world_size"] == 2
    assert two["parameters"] == one["parameters"]
    assert two["memory"]["train_state_bytes"] == one["memory"]["train_state_bytes"]
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for name, tensor in states[0].items():
        # Sums in another order, over 36 steps.
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
    for key in ("val/acc", "test/acc"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], abs=1e-6)
    for key in ("train/loss", "val/loss", "test/loss"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-4)
    # Rank 0 alone writes.
    assert not list(folder.glob("*process_1*"))


@pytest.mark.ddp
def test_divergence_on_one_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    arguments = [text for text in SMALL if text not in ("trainer=cpu", "backbone=mlp")]
    status, _, err = train(
        *arguments,
        "trainer=ddp_cpu",
        "backbone=custom",
        "backbone.target=training.networks.InfiniteOnRankOne",
        f"hydra.run.dir={tmp_path}",
    )
    assert status == 1
    assert err.startswith("error: the training loss is")
    assert err.count("\n") == 1
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


@pytest.mark.ddp
def test_dead_process_is_named(tmp_path: Path) -> None:
    arguments = [text for text in SMALL if text not in ("trainer=cpu", "backbone=mlp")]
    status, _, err = train(
        *arguments,
        "trainer=ddp_cpu",
        "backbone=custom",
        "backbone.target=training.networks.DiesOnRankOne",
        f"hydra.run.dir={tmp_path}",
    )
    assert status == 1
    assert err.startswith("error: another process of this run died")
    assert err.count("\n") == 1
    assert err == f"error: {json.loads((tmp_path / 'result.json').read_text())['error']}\n"
