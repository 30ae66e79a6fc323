"""Layers in common and subspaces, together with fewer bits and with a teacher."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memfold
from memfold.artifact import header_bytes
from memfold.compression import compression_of
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.logging.quiet import hush_libraries
from memfold.quantisation import Packing, rounded
from memfold.tasks import Classification, TaskModule
from memfold.tasks.distillation import Distillation
from memfold.training.schedules import Constant
from strategies.cases import STRATEGIES, network_for, options_of

NAMES = sorted({n for n, case in STRATEGIES.items() if case.needs_layers} | {"subspace"})
RATE = 0.05


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return network_for(name, 1, 4, 3, (24, 24))


def compressed(name: str, **options: Any) -> nn.Module:
    net = memfold.compress(network(name), name, **options_of(name, ratio=0.3) | options)
    compression = compression_of(net)
    assert compression is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # gates and coordinates start at 0
        for values in compression.stored_values().values():
            for tensor in [values] if isinstance(values, Tensor) else values:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return net


def samples(num: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(num, 1, 4, 4, generator=generator)
    return images, torch.randint(3, (num,), generator=generator)


def round_stored(net: nn.Module, bits: int) -> None:
    """Write what a file would hold into the parameters, those of one tensor there at once."""
    compression = compression_of(net)
    assert compression is not None
    for stored in compression.stored_values().values():
        parameters = [stored] if isinstance(stored, Tensor) else list(stored)
        together = torch.cat([parameter.detach().flatten() for parameter in parameters])
        parts = rounded(together, Packing(bits)).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data.copy_(part.view(parameter.shape))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    net.zero_grad()
    images, labels = samples()
    (F.cross_entropy(net(images), labels) + memfold.extra_loss(net)).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_few_bits_is_the_network_with_rounded_values(
    name: str, bits: int, tmp_path: Path
) -> None:
    net, path = compressed(name, bits=bits).eval(), tmp_path / "model.safetensors"
    size = memfold.save(net, path)
    counted = memfold.footprint(net)
    assert size - header_bytes(path) == counted.stored_bytes
    packed = (bits / 8 + 2 / 64) * counted.num_values  # a scale of two bytes for 64 values
    assert packed <= counted.value_bytes < packed + 64
    loaded, images = memfold.load(path, network(name)).eval(), samples()[0]
    before = net(images)
    round_stored(net, bits)
    assert torch.equal(loaded(images), net(images))
    assert not torch.equal(before, net(images))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_knows_the_bits_sees_what_the_file_holds(
    name: str, bits: int, tmp_path: Path
) -> None:
    net, plain = compressed(name, train_bits=bits, train_bits_from=0), compressed(name)
    trained = {n: p.detach().clone() for n, p in net.named_parameters()}
    round_stored(plain, bits)
    found, expected = gradients(net), gradients(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    memfold.before_step(net, optimizer, step=0, total_steps=2)
    optimizer.step()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, trained[key] - RATE * found[key])
    memfold.save(net.eval(), tmp_path / "model.safetensors")
    images = samples()[0]
    with torch.no_grad():
        loaded = memfold.load(tmp_path / "model.safetensors", network(name))
        assert torch.equal(loaded.eval()(images), net(images))
        assert torch.equal(memfold.densify(net)(images), net(images))
        assert not torch.equal(net(images), compressed(name).eval()(images))


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_of_the_same_kind_is_learned_from_as_the_loop_says(
    name: str, tmp_path: Path
) -> None:
    hush_libraries()
    options = {"balance": 0.1} if name == "widenet" else {}
    net = compressed(name, **options).double()
    teacher, alone = compressed(name, seed=4).double(), copy.deepcopy(net)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    images, labels = samples()
    data = TensorDataset(images.double(), labels)

    optimizer = torch.optim.SGD(alone.parameters(), RATE)
    for inputs, targets in DataLoader(data, batch_size=6):
        outputs = alone(inputs)
        hard = -outputs.log_softmax(1)[range(len(targets)), targets].mean()
        taught = (teacher.eval()(inputs) / 2).softmax(1).detach()
        soft = 4 * (taught * (taught.log() - (outputs / 2).log_softmax(1))).sum(1).mean()
        optimizer.zero_grad()
        (0.4 * hard + 0.6 * soft + memfold.extra_loss(alone)).backward()
        optimizer.step()

    task = TaskModule(
        net,
        Classification(DataSpec(Images(1, 4, 4), Classes(3)), label_smoothing=0.0),
        optimizer=lambda trained, _: torch.optim.SGD(trained.parameters(), RATE),
        scheduler=Constant().attach,
        distillation=Distillation(teacher, temperature=2.0, weight=0.6),
    )
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        num_sanity_val_steps=0,
        **dict.fromkeys(off, False),
    )
    trainer.fit(task, DataLoader(data, batch_size=6), DataLoader(data, batch_size=6))
    for key, parameter in alone.named_parameters():
        found = dict(net.named_parameters())[key]
        torch.testing.assert_close(found, parameter, rtol=1e-10, atol=1e-12)
    for key, tensor in teacher.state_dict().items():
        assert torch.equal(before[key], tensor), key


@pytest.mark.parametrize("name", sorted({*NAMES} - {"tied_rps"}))
def test_error_feedback_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    net, path = compressed(name), tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=rf"^[^\n]*\b{name}\b[^\n]*$"):
        memfold.save(net, path, bits=4, data=[samples()])
    assert not path.exists()


def test_tied_layers_in_one_vector_take_part_in_error_feedback(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(2)))

    net, path = memfold.compress(layers(), "tied_rps", ratio=0.3), tmp_path / "model.safetensors"
    inputs = torch.randn(64, 4) @ torch.randn(4, 24)  # with much in common
    weight, errors = net[0].weight, []
    for data in (None, [(inputs, inputs)]):
        memfold.save(net, path, bits=3, data=data)
        change = memfold.load(path, layers())[0].weight - weight
        seen = torch.cat([inputs, inputs @ weight.T])  # by both
        errors.append(float((seen @ change.T).detach().norm()))
    assert errors[1] < 0.8 * errors[0]
