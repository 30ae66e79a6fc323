"""`trainer.compile=true`: the same run, through PyTorch's compiler."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.training import load_model, run
from training.jobs import SMALL, compose_job
from training.run_contents import SENSITIVE, differences, state

OPTIONS = (
    *SENSITIVE,
    "backbone.target=training.networks.DropoutNet",  # which draws from PyTorch alone
    "compression=stable_rps",
    "ratio=0.3",
    "trainer.compile=true",
)
STOP = "+callbacks.stop={_target_: training.signals.SignalAt, hook: on_train_batch_end, number: 15}"


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


class Broken(nn.Module):
    """Two tensors that do not fit, which the compiler finds first."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)) + torch.ones(7)


def compile_eagerly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the graphs of runs be what PyTorch itself computes; return what counts them."""
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> nn.Module:
        graphs.append(1)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    return graphs


def test_a_compiled_run_is_the_run_under_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = compile_eagerly(monkeypatch)
    small = (*SMALL, "compression=stable_rps", "ratio=0.3", "trainer.max_epochs=1")
    results = {
        value: run(compose_job(tmp_path / value, *small, f"trainer.compile={value}"))
        for value in ("false", "true")
    }
    # Training, validation and test, each with whole batches and a smaller last one.
    assert 3 <= len(graphs) <= 6
    plain, compiled = (state(tmp_path / value) for value in results)
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        # The compiler builds each weight on its own: sums in another order.
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)
    assert load_model(tmp_path / "true") is not None


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__path__[0], reason="Inductor's compiler commands quote no folder")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(compose_job(whole, *OPTIONS, "trainer.max_epochs=2"))
    with pytest.raises(SystemExit):
        run(compose_job(broken, *OPTIONS, "trainer.max_epochs=2", STOP))
    torch.compiler.reset()
    run(compose_job(broken, *OPTIONS, "trainer.max_epochs=2", f"resume={broken}"))
    assert differences(broken, whole) == []


def test_what_the_compiler_says_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_eagerly(monkeypatch)
    backbone = ("backbone=custom", f"backbone.target={__name__}.Broken")
    job = compose_job(tmp_path, *SMALL[1:], *backbone, "trainer.compile=true")
    with pytest.raises(InputError, match=r"trainer\.compile: torch\.compile failed \(") as caught:
        run(job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["set", "rigl", "ltr"])
def test_what_changes_its_structure_is_not_compiled(name: str, tmp_path: Path) -> None:
    job = compose_job(tmp_path, *SMALL, f"compression={name}", "trainer.compile=true")
    with pytest.raises(InputError, match=rf"^trainer\.compile=true: compression={name} changes"):
        run(job)
