"""The Python examples of CONTRIBUTING.md, run as they stand there."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import memfold
from memfold.compression import Context, strategy
from memfold.strategies.sharing.mapping import Span

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def names(monkeypatch):
    """What the examples define; the registry forgets the strategy afterwards."""
    monkeypatch.setattr(strategy, "_REGISTRY", dict(strategy._REGISTRY))
    found = {}
    for example in re.findall(
        r"^   ```python\n(.*?)^   ```", CONTRIBUTING.read_text(), re.M | re.S
    ):
        exec(compile(textwrap.dedent(example), str(CONTRIBUTING), "exec"), found)
    return found


def test_the_strategy_counts_in_double_precision_and_scatters_as_it_gathers(names):
    spans = [Span("a", torch.Size([3, 4]), 0, 12), Span("b", torch.Size([2, 5]), 12, 22)]
    mapping = names["CyclicMapping"](spans, 7, seed=0, sign="column")
    matrix = torch.nn.functional.one_hot(torch.arange(22) % 7, 7).double()
    expected = 0.1 * matrix[:12].sum(0) + 1 / 3 * matrix[12:].sum(0)
    assert torch.equal(mapping.accumulate([0.1, 1 / 3]), expected)
    slots = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for span in spans:
        signs = mapping.signs(span).expand(0, span.numel)
        assert len(signs.unique()) == 2
        rows = matrix[span.start : span.stop] * signs[:, None]
        out = torch.zeros(7, dtype=torch.float64)
        assert torch.equal(mapping.gather(slots, span, 0.5), 0.5 * rows @ slots)
        mapping.scatter(rows @ slots, span, 0.5, out)
        torch.testing.assert_close(out, 0.5 * rows.T @ rows @ slots)
    names["test_weights_repeat_after_one_turn"]()


def test_the_layer_strategy_turns_rows_and_comes_back(names, tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))

    assert "Rotated" in names
    net, before = memfold.compress(network(), "rotated", ratio=0.5), network()
    weights = [layer.weight for layer in net]
    for place in (0, 2):
        assert torch.equal(weights[place], before[place].weight)
        assert torch.equal(weights[place + 1], before[place].weight.roll(1, 0))
    memfold.save(net, tmp_path / "net.safetensors")
    loaded = memfold.load(tmp_path / "net.safetensors", network())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(loaded, net, strict=True))
    start = Context(start=lambda model: None)
    with pytest.raises(memfold.InputError, match="init_from gives weights, and rotated keeps"):
        names["Rotated"](ratio=0.5).compress(network(), start)
    names["Rotated"](ratio=1.0).compress(network(), start)


def test_the_backbone_adapts_to_its_images(names):
    assert names["PatchMLP"](3, 32, 5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_the_data_set_reads_what_was_written(names, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(8) % 4)
    found = names["Shapes"](root=str(tmp_path)).load_train()
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [0, 1, 2, 3] * 2


def test_the_study_keeps_the_better_half_and_goes_on(names, tmp_path, capsys):
    settings = {f"lr{lr}": [f"optimizer.lr={lr}", "seed=1"] for lr in (0.1, 0.3, 3, 0.01)}
    program = Path(__file__).parent / "studies" / "stand_in.py"  # best at 0.1
    for _ in range(2):
        assert names["halve"](settings, tmp_path, program, jobs=2) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "best: lr0.1"
        assert [line.split(":")[0] for line in sorted(lines[4:6])] == ["lr0.1-2", "lr0.3-2"]
    starts = [file.read_text() for file in tmp_path.rglob("starts")]
    assert starts == ["new\n"] * 6
