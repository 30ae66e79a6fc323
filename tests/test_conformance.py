"""What every strategy has to do, on real data: one table of strategies, one list of behaviours.

The table is `strategies/cases.py`; it also goes through `strategies/test_any_module.py` (every way
to own a weight: convolutions, attention, recurrent layers, ties) and `test_artifact.py`. Beside
those of the table stand two of tests alone, with one ratio each: `quarter`, which is not dense, and
`three_levels`, which has parts for groups of weights and a term of the loss.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.artifact import header_bytes
from memfold.backbones.mlp import MLP
from memfold.backbones.vit import ViT
from memfold.compression import compression_of
from memfold.compression.rounds import rounds_of
from memfold.data.digits import Digits
from memfold.strategies import strategy_class
from memfold.tasks import TaskModule
from memfold.training import run
from strategies import basis, fixed_ratio
from strategies.cases import STRATEGIES, Case, options_of
from strategies.causal import CausalViT
from training.jobs import PYTHONPATH, SMALL, compose_job
from training.rank_jobs import train_in_two_ranks

RATIO = 0.2
OWN = {fixed_ratio.Quarter.name: fixed_ratio, basis.Basis.name: basis}
NAMES = [*sorted(STRATEGIES), *OWN]


@contextmanager
def own_are_known() -> Iterator[None]:
    """Let the strategies of tests alone be found by their names."""
    with ExitStack() as stack:
        for module in OWN.values():
            stack.enter_context(module.registered())
        yield


@pytest.fixture(scope="module", autouse=True)
def _own_are_known() -> Iterator[None]:
    with own_are_known():
        yield


def has_one_ratio(name: str) -> bool:
    return name in OWN or strategy_class(name).ratios == "one"


def overrides(name: str) -> list[str]:
    options = options_of(name, ratio=RATIO)
    ratio = [f"ratio={options.pop('ratio')}"] if "ratio" in options else []
    chosen = [f"compression.{key}={value}" for key, value in options.items()]
    group = OWN[name].OVERRIDES if name in OWN else [f"compression={name}"]
    case = STRATEGIES.get(name, Case())
    widths = f"backbone.hidden_widths={list(case.hidden_widths)}".replace(" ", "")
    network = [text for text in SMALL if not text.startswith("backbone=")]
    depth = case.transformer_depth
    if case.causal:
        target = "backbone.target=strategies.causal.CausalViT"
        network += ["backbone=custom", target, f"+backbone.args.depth={depth}"]
    elif depth:
        sizes = ["backbone.patch_size=8", "backbone.width=32", f"backbone.depth={depth}"]
        network += ["backbone=vit", *sizes]
    else:
        network += ["backbone=mlp", widths]
    return [*network, *group, *ratio, *chosen, *case.overrides, "data.batch_size=100"]


def job(folder: Path, name: str, *further: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(compose_job(folder, *overrides(name), "trainer.max_epochs=2", *further))


@pytest.fixture(scope="module", params=NAMES)
def completed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """A strategy's name, its run of two epochs, and the result."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, job(folder, request.param)


def dense_backbone(name: str) -> nn.Module:
    case = STRATEGIES.get(name, Case())
    if case.causal:
        return CausalViT(1, 8, 10, depth=case.transformer_depth)
    if case.transformer_depth:
        return ViT(1, 8, 10, patch_size=8, width=32, depth=case.transformer_depth)
    return MLP(1, 8, 10, hidden_widths=case.hidden_widths)


def test_trains_on_real_data(completed: tuple[str, Path, dict[str, Any]]) -> None:
    _, _, result = completed
    assert result["status"] == "completed"
    # Three times what guessing gives, after 24 steps: the slowest, `rand`, has 0.37.
    assert result["metrics"]["val/acc"] > 0.3
    assert result["metrics"]["test/acc"] > 0.3


def test_the_ratio_is_met(completed: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, result = completed
    found = result["compression"]
    if has_one_ratio(name):
        with pytest.warns(UserWarning, match=f"compression={name} ignores ratio=0.123"):
            model = compressed(name, ratio=0.123)
        assert memfold.footprint(model).ratio == found["ratio"]
        assert found["requested_ratio"] is None
    else:
        # The nearest of few: one layer of five.
        tolerance = {"any": 1e-4, "steps": 0.02, "few": 0.25}[strategy_class(name).ratios]
        assert found["ratio"] == pytest.approx(RATIO, rel=tolerance)
        assert found["requested_ratio"] == RATIO
    matrices = (p.numel() for p in dense_backbone(name).parameters() if p.dim() > 1)
    assert result["parameters"]["compressible"] == sum(matrices)


def test_memory_is_what_the_files_hold(completed: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, result = completed
    memory = result["memory"]
    parts = ("value_bytes", "index_bytes", "untouched_bytes")
    assert memory["stored_bytes"] == sum(memory[part] for part in parts)
    size = (folder / "model.safetensors").stat().st_size
    assert size == memory["artifact_bytes"]
    assert size == memory["stored_bytes"] + header_bytes(folder / "model.safetensors")
    assert memory["dense_bytes"] == 4 * sum(p.numel() for p in dense_backbone(name).parameters())
    # Parameter, gradient and momentum, each float32, and what says where the values belong.
    trained = result["parameters"]["trained"]
    assert memory["train_state_bytes"] >= 12 * trained
    if name in OWN or not STRATEGIES[name].trains_dense:
        assert trained < 0.3 * result["parameters"]["dense"]
        assert memory["train_state_bytes"] < 0.5 * 3 * memory["dense_bytes"]


def test_an_artifact_has_the_accuracy_of_its_run(
    completed: tuple[str, Path, dict[str, Any]],
) -> None:
    name, folder, result = completed
    net = memfold.load(folder / "model.safetensors", dense_backbone(name)).eval()
    data = Digits()
    data.setup("test")
    correct = total = 0
    for plain in (net, memfold.densify(net), copy.deepcopy(net)):
        with torch.no_grad():
            for batch in data.test_dataloader():
                images, labels = data.on_after_batch_transfer(batch)
                correct += int((plain(images).argmax(1) == labels).sum())
                total += len(labels)
    assert correct / total == pytest.approx(result["metrics"]["test/acc"], abs=1e-6)


def test_a_run_that_broke_off_ends_with_the_same_bytes(
    completed: tuple[str, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, _ = completed
    begin = TaskModule.on_train_epoch_start

    def break_off(task: TaskModule) -> None:
        if task.current_epoch == 1:
            raise RuntimeError("broken off")
        begin(task)

    with monkeypatch.context() as patched:
        patched.setattr(TaskModule, "on_train_epoch_start", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            job(tmp_path, name)
    result = job(tmp_path, name, f"resume={tmp_path}")
    assert result["status"] == "completed"
    artifacts = [f / "model.safetensors" for f in (folder, tmp_path)]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def compressed(name: str, **further: Any) -> nn.Module:
    """Compress the MLP as it is before training, but for the rounds of a strategy that has some."""
    torch.manual_seed(5)
    model = dense_backbone(name)
    data = Digits(seed=3)
    data.setup("fit")
    options = options_of(name, ratio=RATIO) | further
    if "budget_bytes" in further:
        del options["ratio"]
    batches = data.scoring_batches(7)
    return memfold.compress(model, name, data=batches, loss=F.cross_entropy, seed=7, **options)


@pytest.mark.parametrize("bits", [32, 8, 3])
@pytest.mark.parametrize("name", [name for name in NAMES if not has_one_ratio(name)])
def test_a_budget_is_met_indices_and_bits_included(name: str, bits: int, tmp_path: Path) -> None:
    budget = STRATEGIES[name].budget_bytes
    model = compressed(name, budget_bytes=budget, bits=bits)
    rounds = rounds_of(model)
    for number in range(1, rounds.num_rounds if rounds is not None else 1):
        assert rounds is not None
        rounds.next_round(number)(None)
    # Ranks, widths and kept shares are whole numbers; of numbers of layers there are few.
    least = 0.3 if strategy_class(name).ratios == "few" else 0.85
    assert least * budget < memfold.save(model, tmp_path / "model.safetensors") <= budget


@pytest.mark.parametrize("name", NAMES)
def test_values_in_fewer_bits_are_near_and_pack_again_to_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    model = compressed(name).eval()
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = model(x).detach()
    for bits, tolerance in ((32, 0.0), (16, 0.01), (8, 0.05), (4, 0.5), (3, 1)):
        files = [tmp_path / f"{bits}-{i}.safetensors" for i in range(2)]
        memfold.save(model, files[0], bits=bits)
        packed = memfold.load(files[0], dense_backbone(name)).eval()
        error = (packed(x) - expected).norm() / expected.norm()
        assert error <= tolerance
        assert memfold.save(packed, files[1]) == files[1].stat().st_size
        assert files[1].read_bytes() == files[0].read_bytes()


def digest(name: str) -> str:
    """Hash what a strategy decides before training: the structure, and what it starts from."""
    model = compressed(name)
    compression = compression_of(model)
    assert compression is not None
    whole = hashlib.sha256()
    for key, tensor in sorted((compression.value_tensors() | compression.index_tensors()).items()):
        whole.update(key.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def test_the_same_seed_gives_the_same_structure_in_a_new_process() -> None:
    torch.set_num_threads(1)
    code = (
        "import json, torch; torch.set_num_threads(1)\n"
        "from test_conformance import NAMES, digest, own_are_known\n"
        "with own_are_known():\n"
        "    print(json.dumps({name: digest(name) for name in NAMES}))"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {name: digest(name) for name in NAMES}


def two_ranks(folder: Path, name: str) -> list[str]:
    """Return the overrides of a job whose ranks say what they have, with a batch for both."""
    probe = "+callbacks.probe._target_=training.probes.StructureProbe"
    given = [text for text in overrides(name) if text != "trainer=cpu"]
    given = [text.replace("batch_size=100", "batch_size=50") for text in given]
    place = f"+callbacks.probe.folder={folder / name}"
    return [*given, probe, place, "trainer.max_epochs=1", "trainer=ddp_cpu"]


@pytest.mark.ddp
@pytest.mark.parametrize("names", [NAMES[:6], NAMES[6:11], NAMES[11:]], ids=" ".join)
def test_two_ranks_train_what_one_does(names: list[str], tmp_path: Path) -> None:
    train_in_two_ranks(tmp_path, {name: two_ranks(tmp_path, name) for name in names})
    for name in names:
        two, one = tmp_path / name, tmp_path / "one" / name
        probe = ["+callbacks.probe._target_=training.probes.StructureProbe"]
        job(one, name, *probe, f"+callbacks.probe.folder={one}", "trainer.max_epochs=1")
        alone, *ranks = (
            json.loads(file.read_text())
            for file in (one / "rank_0.json", two / "rank_0.json", two / "rank_1.json")
        )
        assert ranks[0] == ranks[1]
        assert ranks[0]["structure"] == alone["structure"]
        weights = [
            torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for folder in (one, two)
        ]
        for key, tensor in weights[0].items():
            # Sums in another order, over 12 steps in single precision.
            torch.testing.assert_close(weights[1][key], tensor, rtol=1e-4, atol=1e-5)
