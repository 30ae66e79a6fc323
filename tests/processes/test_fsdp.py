"""Sharded training, tried with processes on the CPU; Lightning offers it on GPUs only."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memfold
from memfold.backbones.mlp import MLP
from memfold.errors import InputError
from memfold.training import run
from strategies.cases import SHARING
from training.jobs import SMALL, compose_job, train

SHARDED = (
    "trainer=fsdp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.strategy._target_=training.sharding.CpuFSDPStrategy",
    "+trainer.strategy.process_group_backend=gloo",
)
RUN = (*(text for text in SMALL if text != "trainer=cpu"), "data.batch_size=50", "ratio=0.2")


def refuse(folder: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        run(compose_job(folder, *RUN, *SHARDED, *overrides))
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", ".lock", "result.json"]
    return str(caught.value)


@pytest.mark.parametrize("name", SHARING)
def test_shared_weights_are_refused(name: str, tmp_path: Path) -> None:
    message = refuse(tmp_path, f"compression={name}")
    assert message.startswith(f"trainer=fsdp with compression={name}: all layers read one vector")
    assert "trainer=ddp is right" in message


@pytest.mark.parametrize("name", ["ltr", "set", "rigl", "supermask", "low_rank"])
def test_what_needs_whole_weights_between_steps_is_refused(name: str, tmp_path: Path) -> None:
    message = refuse(tmp_path, f"compression={name}")
    assert "it looks at whole weights between two steps; use trainer=ddp" in message


def test_shared_weights_are_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trainer=fsdp with compression=stable_rps: all layers"):
        run(compose_job(tmp_path, *RUN, "trainer=fsdp", "compression=stable_rps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_has_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PyTorch finds no GPU here; trainer=cpu .*ddp_cpu"):
        run(compose_job(tmp_path, *RUN, "trainer=ddp"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val: "),
        ("artifact.train_bits=4", "artifact.train_bits rounds whole tensors, and trainer=fsdp"),
    ],
)
def test_what_needs_all_of_a_tensor_is_refused(
    override: str, expected: str, tmp_path: Path
) -> None:
    assert refuse(tmp_path, "compression=mag", override).startswith(expected)


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # Sums in another order, over 24 to 36 steps.
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["dense", "small", "rand", "mag", "snip", "grasp", "synflow"])
def test_shards_train_what_copies_do(name: str, tmp_path: Path) -> None:
    common = (*RUN, f"compression={name}", "trainer.max_epochs=2", "test_checkpoint=best")
    folders = {kind: tmp_path / kind for kind in ("shards", "copies")}
    for folder, kind in zip(folders.values(), (SHARDED, ["trainer=ddp_cpu"]), strict=True):
        status, _, err = train(*common, *kind, f"hydra.run.dir={folder}")
        assert status == 0, err
    assert_close(weights(folders["copies"]), weights(folders["shards"]))
    results = [json.loads((f / "result.json").read_text()) for f in folders.values()]
    for key in ("compression", "parameters", "epochs", "training"):
        assert results[0][key] == results[1][key]
    for key, value in results[1]["metrics"].items():
        # One of the 144 validation samples may fall on the other side.
        assert results[0]["metrics"][key] == pytest.approx(value, abs=0.008)
    memory = [result["memory"] for result in results]
    for key in ("stored_bytes", "value_bytes", "index_bytes", "artifact_bytes"):
        assert memory[0][key] == memory[1][key]
    # Of one process: its share of parameters, gradients and momentum.
    assert memory[0]["train_state_bytes"] < 0.75 * memory[1]["train_state_bytes"]
    outputs = []
    for folder in folders.values():
        net = memfold.load(folder / "model.safetensors", MLP(1, 8, 10)).eval()
        outputs.append(net(torch.ones(2, 1, 8, 8)))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.ddp
def test_sharded_run_goes_on_alone_and_back(tmp_path: Path) -> None:
    """Two sharded epochs, a third of one process with the whole batch, a fourth sharded."""
    common = (*RUN, "compression=mag", "scheduler=constant")
    folder, whole = tmp_path / "stages", tmp_path / "whole"
    two, four = "trainer.max_epochs=2", "trainer.max_epochs=4"
    status, _, err = train(*common, *SHARDED, two, f"hydra.run.dir={folder}")
    assert status == 0, err
    alone = ("trainer=cpu", "trainer.max_epochs=3", "data.batch_size=100", f"resume={folder}")
    run(compose_job(folder, *common, *alone))
    status, _, err = train(f"resume={folder}", *SHARDED, four, "data.batch_size=50")
    assert status == 0, err
    status, _, err = train(*common, *SHARDED, four, f"hydra.run.dir={whole}")
    assert status == 0, err
    assert_close(weights(whole), weights(folder))
