"""The Python examples of the README, run as they stand there."""

import copy
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memfold
from memfold.compression import compression_of
from memfold.logging.quiet import hush_libraries

README = Path(__file__).parents[1] / "README.md"


def test_the_table_lists_every_strategy_with_its_card():
    (row,) = re.findall(r"^\| `compression` \|.*$", README.read_text(), re.MULTILINE)
    links = re.findall(r"\[(\w+)\]\(docs/strategies/(\w+)\.md\)", row)
    assert sorted(links) == [(name, name) for name in memfold.strategies()]


@pytest.fixture
def names(tmp_path, monkeypatch, capsys):
    """What the examples define that need nothing else, once they have run one after the other."""
    (section,) = re.findall(
        r"## Use it without Lightning.*?(?=\n## )", README.read_text(), re.DOTALL
    )
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    hush_libraries()
    names = {}
    exec(compile("\n".join(examples), "README.md", "exec"), names)
    return names


def test_the_first_example_counts_and_saves(names, tmp_path, capsys):
    assert "stored_ratio" in capsys.readouterr().out
    assert (tmp_path / "small.safetensors").is_file()


def test_the_lightning_module_trains_as_a_plain_loop(names):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    task = names["Task"](copy.deepcopy(net))
    # Of 250 steps, numbers 100 and 200 are updates; the last one is too late.
    data = TensorDataset(torch.randn(500, 8), torch.randint(0, 4, (500,)))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = Trainer(max_epochs=2, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(task, DataLoader(data, batch_size=4))
    memfold.compress(net, "rigl", ratio=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(250):
        inputs, targets = data[4 * (step % 125) : 4 * (step % 125) + 4]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=250)
        optimizer.step()
    assert compression_of(task).structure_version == 1
    for one, other in zip(net.state_dict().values(), task.net.state_dict().values(), strict=True):
        assert torch.equal(one, other)
