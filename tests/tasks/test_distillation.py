"""Distillation: the loss against a loop, its limits, and a teacher that nobody else sees."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memfold.data.spec import Classes, DataSpec, Images
from memfold.logging.quiet import hush_libraries
from memfold.tasks import Classification, TaskModule
from memfold.tasks.distillation import Distillation, distillation_loss
from memfold.training.schedules import Constant
from reference import distillation as reference

TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0, 20.0])


def logits(seed: int, *, rows: int = 6, classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student = student.clone().requires_grad_()
    distillation_loss(student, teacher, temperature).backward()
    assert student.grad is not None
    return student.grad


@given(st.integers(0, 1000), TEMPERATURES)
def test_loss_is_that_of_the_loop(seed: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    expected = reference.distillation_loss(student.tolist(), teacher.tolist(), temperature)
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(expected)


@given(st.integers(0, 1000), TEMPERATURES)
def test_a_student_like_its_teacher_has_nothing_to_learn(seed: int, temperature: float) -> None:
    teacher = logits(seed)
    # A constant added to the logits of a row changes no probability.
    student = teacher + torch.arange(len(teacher), dtype=torch.float64)[:, None]
    for other, tolerance in ((teacher, 0.0), (student, 1e-12)):
        assert float(distillation_loss(other, teacher, temperature)) <= tolerance
        assert gradient(other, teacher, temperature).abs().max() < 1e-12


@given(st.integers(0, 1000), TEMPERATURES)
def test_gradient_is_the_difference_of_the_softened_outputs(seed: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    outputs = [(values / temperature).softmax(1) for values in (student, teacher)]
    expected = temperature * (outputs[0] - outputs[1]) / len(student)
    torch.testing.assert_close(gradient(student, teacher, temperature), expected)


def test_hot_distillation_matches_logits() -> None:
    student, teacher = logits(1), logits(2)
    student, teacher = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    expected = (student - teacher) / student.shape[1] / len(student)
    found = gradient(student, teacher, 1e4)
    # The next term of the expansion is smaller by the logits over T.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


def test_temperature_keeps_the_scale_of_the_gradient() -> None:
    student, teacher = logits(1, rows=200), logits(2, rows=200)
    sizes = [float(gradient(student, teacher, t).norm()) for t in (1.0, 4.0, 20.0, 100.0)]
    # Without T^2 they would fall by a factor of 10,000.
    assert max(sizes) < 3 * min(sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    student, teacher = logits(1).to(dtype), logits(2).to(dtype)
    loss = distillation_loss(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    expected = distillation_loss(student.double(), teacher.double(), 4.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


CLASSES = 3


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(10, 5, generator=generator), torch.randint(
        CLASSES, (10,), generator=generator
    )


def network(seed: int, *, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, CLASSES)
    )


def fit(
    folder: Path, samples: tuple[Tensor, Tensor], distillation: Distillation | None, epochs: int = 3
) -> tuple[TaskModule, Trainer]:
    hush_libraries()
    task = TaskModule(
        network(0),
        Classification(DataSpec(Images(1, 1, 1), Classes(CLASSES)), label_smoothing=0.0),
        optimizer=lambda net, _: torch.optim.SGD(net.parameters(), lr=0.1),
        scheduler=Constant().attach,
        distillation=distillation,
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader(TensorDataset(*samples), batch_size=5)
    trainer.fit(task, loader, loader)
    return task, trainer


def test_weight_zero_is_training_on_the_labels(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    plain, _ = fit(tmp_path, samples, None)
    weightless = Distillation(network(1), temperature=4.0, weight=0.0)
    distilled, trainer = fit(tmp_path, samples, weightless)
    assert "train/distill_loss" in trainer.callback_metrics
    for name, tensor in plain.state_dict().items():
        assert torch.equal(distilled.state_dict()[name], tensor), name


def test_loss_is_the_weighted_sum_and_the_teacher_sees_the_same_images(
    samples: tuple[Tensor, Tensor],
) -> None:
    images, labels = samples
    student, teacher = network(0), network(1, dropout=0.5)
    seen: list[Tensor] = []
    recording: list[bool] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0])
        recording.append(torch.is_grad_enabled())

    teacher.register_forward_pre_hook(look)
    distillation = Distillation(teacher, temperature=2.0, weight=0.7)
    outputs = student(images)
    loss = distillation.mix(F.cross_entropy(outputs, labels), distillation.loss(images, outputs))
    assert seen == [images]
    assert recording == [False]
    hard = reference.cross_entropy(outputs.tolist(), labels.tolist())
    soft = reference.distillation_loss(outputs.tolist(), teacher(images).tolist(), 2.0)
    assert loss.item() == pytest.approx(0.3 * hard + 0.7 * soft, rel=1e-5)


def test_the_teacher_stays_as_it_is_and_out_of_sight(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    teacher = network(1, dropout=0.5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distillation = Distillation(teacher, temperature=4.0, weight=0.9, fingerprint="abc")
    task, trainer = fit(tmp_path, samples, distillation)
    assert not any(module.training for module in teacher.modules())
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(before[name], tensor), name
    ours = {id(parameter) for parameter in teacher.parameters()}
    assert not ours & {id(parameter) for parameter in task.parameters()}
    assert task.state_dict().keys() == fit(tmp_path, samples, None)[0].state_dict().keys()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["teacher"] == "abc"
    assert checkpoint["state_dict"].keys() == task.state_dict().keys()


def test_a_student_learns_from_the_teacher_alone(
    samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images, labels = samples
    distillation = Distillation(network(1), temperature=4.0, weight=1.0)
    _, trainer = fit(tmp_path, (images, labels), distillation, epochs=1)
    first = float(trainer.callback_metrics["train/distill_loss"])
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(first)
    _, trainer = fit(tmp_path, (images, labels), distillation, epochs=30)
    assert float(trainer.callback_metrics["train/distill_loss"]) < first / 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_teacher_follows_the_images_dtype(
    samples: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    images = samples[0].to(dtype)
    student = network(0).to(dtype)
    distillation = Distillation(network(1), temperature=4.0, weight=0.5)
    loss = distillation.loss(images, student(images))
    loss.backward()
    assert torch.isfinite(loss)
