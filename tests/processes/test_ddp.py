"""Two processes train as one does."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.backbones.resnet20 import ResNet20
from memfold.errors import InputError
from memfold.tasks import TaskModule
from memfold.training import run
from strategies.cases import STRATEGIES, options_of
from training.jobs import SMALL, compose_job, train_forked
from training.launching import finish, start_torchrun

EVALUATED = ("optimizer.lr=0", "data.batch_size=20", "data.val_fraction=0.101")
PROBE = "+callbacks.probe._target_=training.rank_probes.EpochProbe"


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_with_half_the_batch_are_one(tmp_path: Path) -> None:
    common = [*SMALL, "compression=stable_rps", "ratio=0.05", "trainer.max_epochs=3"]
    common += ["callbacks=ema", "callbacks.ema.decay=0.9"]
    one = run(compose_job(tmp_path / "one", *common, "data.batch_size=100"))
    folder = tmp_path / "two"
    status, _, err = train_forked(
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


@pytest.mark.slow
@pytest.mark.ddp
def test_divergence_on_one_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    arguments = [text for text in SMALL if text not in ("trainer=cpu", "backbone=mlp")]
    status, _, err = train_forked(
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
@pytest.mark.slow
def test_dead_process_is_named(tmp_path: Path) -> None:
    arguments = [text for text in SMALL if text not in ("trainer=cpu", "backbone=mlp")]
    status, _, err = train_forked(
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


def evaluate_on_ranks(folder: Path, num_ranks: int) -> tuple[list[list[dict]], dict]:
    """Train two epochs at learning rate 0, until early stopping; return what the ranks saw.

    145 validation samples and 360 test samples, in batches of 20.
    """
    small = [text for text in SMALL if text != "trainer=cpu"]
    process = start_torchrun(
        folder,
        *small,
        *EVALUATED,
        "trainer=ddp_cpu",
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        PROBE,
        f"+callbacks.probe.folder={folder}",
        options=("--standalone", f"--nproc-per-node={num_ranks}"),
    )
    status, _, err = finish(process)
    assert status == 0, err
    ranks = [json.loads((folder / f"epochs_{rank}.json").read_text()) for rank in range(num_ranks)]
    (result,) = folder.rglob("result.json")
    assert len(list(folder.rglob("overrides.yaml"))) == 1
    return ranks, json.loads(result.read_text())


@pytest.mark.ddp
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_evaluate_and_stop_as_one(num_ranks: int, tmp_path: Path) -> None:
    one = run(compose_job(tmp_path / "one", *SMALL, *EVALUATED, "trainer.max_epochs=1"))
    (tmp_path / "ranks").mkdir()
    ranks, result = evaluate_on_ranks(tmp_path / "ranks", num_ranks)
    # The best epoch is the first, the next brings nothing new.
    assert [row["epoch"] for row in ranks[0]] == [0, 1]
    assert result["epochs"] == 2
    assert result["environment"]["world_size"] == num_ranks
    # What schedules, checkpoints and sweeps look at.
    assert all(rank == ranks[0] for rank in ranks)
    for key in ("val/acc", "test/acc"):
        assert result["metrics"][key] == one["metrics"][key]
    for key in ("val/loss", "test/loss"):
        # A mean of the ranks' means would be wrong by 1e-3.
        assert result["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-6)


def test_resumed_run_remembers_when_it_improved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At learning rate 0 nothing improves after the first epoch."""
    stops = ["callbacks=early_stopping", "callbacks.early_stopping.patience=3"]
    common = [*SMALL, *stops, "optimizer.lr=0", "data.batch_size=200"]
    begin = TaskModule.on_train_epoch_start

    def break_off(task: TaskModule) -> None:
        if task.current_epoch == 2:
            raise RuntimeError("broken off")
        begin(task)

    with monkeypatch.context() as patched:
        patched.setattr(TaskModule, "on_train_epoch_start", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            run(compose_job(tmp_path, *common))
    result = run(compose_job(tmp_path, *common, f"resume={tmp_path}"))
    assert (result["epochs"], result["max_epochs"]) == (4, 30)
    for epochs in (30, 20):
        again = [f"resume={tmp_path}", f"trainer.max_epochs={epochs}"]
        with pytest.raises(InputError, match=r"completed; .* must be above 30"):
            run(compose_job(tmp_path, *common, *again))


@pytest.mark.ddp
def test_batchnorm_is_not_synchronised_on_cpus(tmp_path: Path) -> None:
    options = [text for text in SMALL if text != "trainer=cpu"]
    cfg = compose_job(tmp_path, *options, "trainer=ddp_cpu", "trainer.sync_batchnorm=true")
    with pytest.raises(InputError, match=r"trainer.sync_batchnorm=true: .* on GPUs only"):
        run(cfg)
    single = ["trainer.sync_batchnorm=true", "debug=fast"]
    assert run(compose_job(tmp_path / "one", *SMALL, *single))["status"] == "completed"


@pytest.mark.parametrize("name", sorted(n for n in STRATEGIES if not STRATEGIES[n].needs_layers))
def test_batchnorm_can_be_replaced_after_compression(name: str, tmp_path: Path) -> None:
    """Lightning does so before it trains, and takes it back afterwards."""
    torch.manual_seed(0)
    plain = ResNet20(3, 8, 10)
    images = torch.randn(6, 3, 8, 8)
    batches = [(images, torch.arange(6))]
    net = memfold.compress(
        deepcopy(plain), name, data=batches, loss=F.cross_entropy, **options_of(name)
    )
    owners = {key: id(tensor) for key, tensor in net.named_parameters()}
    layers = TorchSyncBatchNorm()
    net = layers.apply(net)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == 21
    assert {key: id(tensor) for key, tensor in net.named_parameters()} == owners
    net(images).sum().backward()  # moves the running means, too
    net.eval()
    expected = net(images)
    net = layers.revert(net)
    memfold.save(net, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", ResNet20(3, 8, 10)).eval()
    dense = memfold.densify(net).eval()
    for found in (loaded, dense):
        torch.testing.assert_close(found(images), expected)
    assert dense.state_dict().keys() == plain.state_dict().keys()
