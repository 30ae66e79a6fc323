"""The network of a run from its folder alone."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from memfold.data.digits import Digits
from memfold.errors import InputError
from memfold.logging.quiet import hush_libraries
from memfold.training import load_model, run
from memfold.training.build import build
from training.jobs import SMALL, compose_job


@pytest.fixture(scope="module", params=["dense", "stable_rps", "ltr", "snip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    ratio = [] if request.param == "dense" else ["ratio=0.3"]
    rounds = ["compression.fraction=0.7"] if request.param == "ltr" else []
    overrides = [f"compression={request.param}", *ratio, *rounds, "trainer.max_epochs=2"]
    run(compose_job(folder, *SMALL, *overrides, "data.batch_size=128"))
    return folder


def accuracy(net: torch.nn.Module) -> float:
    data = Digits()
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch) for batch in data.test_dataloader()]
    with torch.no_grad():
        hits = [(net(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(hits).mean())


def test_the_network_is_the_one_that_was_tested(folder: Path) -> None:
    expected = json.loads((folder / "result.json").read_text())
    before = torch.get_rng_state()
    nets = {weights: load_model(folder, weights) for weights in ("artifact", "last", "best")}
    assert torch.equal(torch.get_rng_state(), before)
    for weights in ("artifact", "last"):
        net = nets[weights]
        assert not net.training
        assert accuracy(net) == pytest.approx(expected["metrics"]["test/acc"], abs=1e-6)
    states = [nets[weights].state_dict() for weights in ("artifact", "last")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert accuracy(nets["best"]) > 0.5


def test_lightning_reads_the_checkpoint_without_a_pickle(folder: Path, tmp_path: Path) -> None:
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    hush_libraries()
    experiment = build(compose_job(tmp_path, *overrides), tmp_path)
    path = folder / "checkpoints" / "last.ckpt"
    (metrics,) = experiment.trainer.test(
        experiment.module, experiment.data, ckpt_path=path, weights_only=True, verbose=False
    )
    expected = json.loads((folder / "result.json").read_text())["metrics"]
    assert metrics["test/acc"] == pytest.approx(expected["test/acc"], abs=1e-6)
    assert metrics["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


def test_other_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path} is no run folder"):
        load_model(tmp_path)
    compose_job(tmp_path, *SMALL)
    with pytest.raises(InputError, match=r"has no weights: neither model\.safetensors nor"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="weights must be one of artifact, last, best"):
        load_model(tmp_path, "first")  # type: ignore[arg-type]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"has no model\.safetensors; there are weights=last"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"^.*last\.ckpt is truncated"):
        load_model(tmp_path, "last")
    (tmp_path / ".hydra" / "config.yaml").write_text("[1]")
    with pytest.raises(InputError, match="is no run folder"):
        load_model(tmp_path)
