"""Training that knows the bits: gradients go straight through, and files hold what was measured."""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memfold
from memfold.artifact import header_bytes
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.memory import train_state_bytes
from memfold.quantisation import Packing, rounded
from memfold.training import run
from memfold.training.weight_average import WeightAverage
from strategies.cases import ANY_MODULE, options_of
from training.jobs import SMALL, compose_job

BITS = 4


class Net(nn.Module):
    """An MLP, one layer of which may be computed again for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        again = checkpoint(self.middle, x, use_reentrant=False) if self.checkpoints else None
        return self.last((self.middle(x) if again is None else again).relu())


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 12, generator=generator)
    return x, torch.randint(0, 4, (32,), generator=generator)


def compressed(name: str, **options: Any) -> Net:
    loss = F.cross_entropy
    memfold.compress(net := Net(), name, data=[batch()], loss=loss, **options_of(name) | options)
    return net


def known(name: str, start: float = 0.0) -> Net:
    """Compress a network whose training knows the bits."""
    return compressed(name, train_bits=BITS, train_bits_from=start)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def stored(net: nn.Module) -> Mapping[str, Tensor]:
    compression = compression_of(net)
    assert compression is not None
    return compression.value_tensors()


def round_stored(net: nn.Module) -> None:
    """Write what an artifact would hold into the parameters, one tensor of the artifact at once."""
    compression = compression_of(net)
    assert compression is not None
    values = {
        name: rounded(tensor, Packing(BITS)).flatten() for name, tensor in stored(net).items()
    }
    for name, parameters in compression.stored_values().items():
        whole = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        parts = values[name].split([parameter.numel() for parameter in whole])
        for parameter, part in zip(whole, parts, strict=True):
            parameter.data = part.view(parameter.shape).clone()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    net.zero_grad()
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ANY_MODULE)
def test_gradients_are_those_of_the_rounded_values_and_change_the_trained_ones(name: str) -> None:
    net, plain = known(name), compressed(name)
    before = state(net)
    round_stored(plain)
    assert_equal(gradients(net), gradients(plain))
    assert_equal(state(net), before)
    step = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    memfold.before_step(net, optimizer, step=0, total_steps=9)
    if name not in ("supermask", "subspace"):  # scores are not stored; coordinates start at 0
        assert any(not torch.equal(p, step[n]) for n, p in net.named_parameters())
    for parameter in net.parameters():
        assert parameter.grad is not None
    expected = {n: p.detach() - 0.5 * p.grad for n, p in net.named_parameters()}  # type: ignore
    assert_equal({n: p.detach() for n, p in net.named_parameters()}, {n: before[n] for n in step})
    optimizer.step()
    assert_equal({n: p.detach() for n, p in net.named_parameters()}, expected)


@pytest.mark.parametrize("name", ANY_MODULE)
def test_evaluation_is_that_of_the_artifact_at_any_time(name: str, tmp_path: Path) -> None:
    net, (x, _) = known(name, 0.5).eval(), batch()
    before = state(net)
    with torch.no_grad():
        found = net(x)
        assert torch.equal(net(x), found)
        assert_equal(state(net), before)
        memfold.save(net, tmp_path / "model.safetensors")
        loaded = memfold.load(tmp_path / "model.safetensors", Net()).eval()
        for other in (loaded, memfold.densify(net), copy.deepcopy(net)):
            assert torch.equal(other(x), found)
        with torch.inference_mode():
            assert torch.equal(net(x), found)
    if name not in ("supermask", "subspace"):
        assert not torch.equal(compressed(name).eval()(x), found)
    assert memfold.footprint(net).value_bytes == memfold.footprint(loaded).value_bytes
    copies = sum(tensor.nbytes for tensor in stored(net).values())
    assert train_state_bytes(known(name)) == train_state_bytes(compressed(name)) + copies


class Twice(Net):
    """Calls itself, and reads weights after that."""

    takes_gradients = False
    is_inner = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_inner:
            return super().forward(x)
        self.is_inner = True
        with torch.set_grad_enabled(self.takes_gradients):
            inner = self(x)
        self.is_inner = False
        return super().forward(x) + inner


@pytest.mark.parametrize("name", ["dense", "stable_rps"])
@pytest.mark.parametrize("takes_gradients", [False, True])
def test_a_pass_within_a_pass_leaves_it_rounded(name: str, takes_gradients: bool) -> None:
    memfold.compress(net := Twice(), name, train_bits=BITS, train_bits_from=0, **options_of(name))
    net.takes_gradients, (x, _) = takes_gradients, batch()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with torch.no_grad():
        assert torch.equal(net(x), memfold.densify(net)(x))
    memfold.release(net)
    assert_equal({name: parameter.detach() for name, parameter in net.named_parameters()}, before)


def test_threads_may_evaluate_at_the_same_time() -> None:
    """The second begins within the first one's pass, and ends after it."""
    net, (x, _) = known("dense").eval(), batch()
    before, both = state(net), threading.Barrier(2, timeout=60)
    with torch.no_grad():
        expected = net(x)
    others = []

    def wait(*_: object) -> None:
        both.wait()
        if threading.current_thread() is not threading.main_thread():
            main_is_done.wait(60)

    def evaluate() -> None:
        with torch.no_grad():
            others.append(net(x))

    main_is_done, thread = threading.Event(), threading.Thread(target=evaluate)
    handle = net.first.register_forward_hook(wait)
    thread.start()
    with torch.no_grad():
        found = net(x)
    main_is_done.set()
    thread.join()
    handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(others[0], expected)
    assert_equal(state(net), before)


@pytest.mark.parametrize("name", ["dense", "roast"])
def test_gradients_after_an_interrupted_evaluation_are_those_of_rounded_values(name: str) -> None:
    net, once = known(name), gradients(known(name))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = net.middle.register_forward_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        net(batch()[0])
    handle.remove()
    assert_equal(gradients(net), once)


def test_passes_of_the_training_are_rounded_from_the_given_part_on() -> None:
    net, (x, y) = known("stable_rps", 0.5), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    is_rounded = []
    for step in range(7):
        before = stored(net)["shared_values"].clone()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        is_rounded.append(not torch.equal(before, net.get_parameter("shared_values")))
        memfold.before_step(net, optimizer, step=step, total_steps=7)
        optimizer.step()
    assert is_rounded == [False] * 4 + [True] * 3


@pytest.mark.parametrize("name", ["dense", "stable_rps", "mag", "low_rank"])
def test_gradients_sum_up_over_passes_and_through_checkpoints(name: str) -> None:
    net, again = known(name), known(name)
    again.checkpoints = True
    once = gradients(net)
    assert_equal(gradients(again), once)
    memfold.release(again.eval())
    x, y = batch()
    with torch.no_grad():  # between two passes of one step
        again(x)
    F.cross_entropy(again(x), y).backward()
    twice = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert_equal(twice, {n: 2 * gradient for n, gradient in once.items()})


def test_a_state_dict_holds_what_is_trained_and_can_be_loaded_in_a_pass() -> None:
    net, other = known("low_rank"), known("low_rank")
    before = state(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    assert_equal(nn.Sequential(net).state_dict(), {f"0.{n}": t for n, t in before.items()})
    twin = copy.deepcopy(net)
    memfold.release(twin)
    trained = {n: p.detach() for n, p in twin.named_parameters()}
    assert_equal(trained, {name: before[name] for name in trained})
    net.load_state_dict(other.state_dict())
    assert_equal(state(net), state(other))
    assert torch.equal(net(x), other(x))


def test_a_training_without_before_step_is_refused_before_it_is_rounded() -> None:
    net, (x, y) = known("stable_rps", 0.5), batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):  # gradients that are summed up
        F.cross_entropy(net(x), y).backward()
    optimizer.step()
    with pytest.raises(InputError, match=r"before_step, which has to come before every step"):
        net(x)


def test_a_step_without_before_step_is_refused() -> None:
    net, (x, y) = known("dense"), batch()
    optimizer = torch.optim.Adam(net.parameters())
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    for later in (lambda: net(x), net.state_dict, lambda: memfold.release(net)):
        with pytest.raises(InputError, match=r"before_step, which has to come before every step"):
            later()


def test_a_step_of_a_copy_without_before_step_is_refused() -> None:
    net, (x, y) = known("dense"), batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        F.cross_entropy(net(x), y).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=9)
        optimizer.step()
    F.cross_entropy(net(x), y).backward()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.first.weight.add_(1)
    with pytest.raises(InputError, match=r"before_step, which has to come before every step"):
        twin(x)


@pytest.mark.parametrize("name", ["stable_rps", "mag", "low_rank"])
def test_a_loaded_model_goes_on_to_know_the_bits(name: str, tmp_path: Path) -> None:
    memfold.save(known(name), tmp_path / "first.safetensors")
    net, (x, y) = memfold.load(tmp_path / "first.safetensors", Net()), batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        F.cross_entropy(net(x), y).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=3)
        optimizer.step()
    memfold.save(net, tmp_path / "second.safetensors")
    again = memfold.load(tmp_path / "second.safetensors", Net()).eval()
    with torch.no_grad():
        assert torch.equal(net.eval()(x), again(x))


def test_other_bits_than_those_of_the_training_can_be_asked_for(tmp_path: Path) -> None:
    net, path = known("mag"), tmp_path / "model.safetensors"
    trained = compression_of(net)
    assert trained is not None
    expected = trained.value_tensors()
    sizes = {bits: memfold.save(net, path, bits=bits) for bits in (None, 4, 8, 32)}
    assert sizes[None] == pytest.approx(sizes[4], abs=16)
    assert sizes[4] < sizes[8] < sizes[32]
    loaded = compression_of(memfold.load(path, Net()))
    assert loaded is not None
    assert_equal(loaded.value_tensors(), expected)


def test_parameters_of_others_are_refused() -> None:
    net, (x, _) = known("mag"), batch()
    with pytest.raises(InputError, match=r"give memfold\.densify\(model\) to torch\.func"):
        torch.func.functional_call(net, {n: p.clone() for n, p in net.named_parameters()}, (x,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_bits": 32}, "train_bits must be null or one of 16, 8, 7, 6, 5, 4, 3, got 32"),
        ({"train_bits": 2}, "train_bits must be null or one of 16, 8, 7, 6, 5, 4, 3, got 2"),
        ({"train_bits": 4, "bits": 8}, "bits=8 with artifact.train_bits=4: what the training"),
        (
            {"train_bits": 4, "train_bits_from": 1.5},
            r"train_bits_from must be a number in \[0, 1\]",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compressed("stable_rps", **options)


class _Task(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_an_average_takes_the_place_of_what_is_trained_within_a_step() -> None:
    """Between two passes that sum up gradients, as in a validation then."""
    net, average, trainer = known("stable_rps"), WeightAverage(decay=0.5), Trainer(logger=False)
    task = _Task(net)
    average.on_fit_start(trainer, task)
    before = state(net)
    averages = {name: tensor + 1 for name, tensor in task.named_parameters()}
    average._averages = {name: tensor.detach() for name, tensor in averages.items()}
    gradients(net)
    average.on_validation_start(trainer, task)
    assert_equal({f"net.{n}": p.detach() for n, p in net.named_parameters()}, average._averages)
    with torch.no_grad():
        net.eval()(batch()[0])
    average.on_validation_end(trainer, task)
    assert_equal(state(net), before)


def test_a_run_that_broke_off_ends_with_the_same_file_which_has_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    overrides = (*SMALL, "compression=low_rank", "ratio=0.2", "artifact.train_bits=3")
    overrides += ("trainer.max_epochs=2", "callbacks=ema", "trainer.accumulate_grad_batches=2")
    overrides += ("artifact.train_bits_from=0.25", "data.train_subset=300")
    overrides += ("artifact.coding=huffman",)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(compose_job(whole, *overrides))
    assert result["compression"]["bits"] == 3
    file = whole / "model.safetensors"
    memory = result["memory"]
    assert memory["stored_bytes"] + header_bytes(file) == memory["artifact_bytes"]
    num_values = round(result["compression"]["ratio"] * result["parameters"]["compressible"])
    assert memory["value_bytes"] < 0.95 * num_values * (3 / 8 + 2 / 64)
    metrics = result["metrics"]
    for name in ("val/acc", "val/loss", "test/acc", "test/loss"):
        assert metrics[f"packed/{name}"] == metrics[name]
    begin = LightningModule.on_train_epoch_start

    def break_off(task: LightningModule) -> None:
        if task.current_epoch == 1:
            raise RuntimeError("broken off")
        begin(task)

    with monkeypatch.context() as patched:
        patched.setattr("memfold.tasks.TaskModule.on_train_epoch_start", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            run(compose_job(broken, *overrides))
    run(compose_job(broken, *overrides, f"resume={broken}"))
    files = [folder / "model.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
