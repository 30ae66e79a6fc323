"""The whole configuration is checked before anything is built; the composition takes place once."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch import nn

from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.tasks import Classification, TaskModule
from memfold.tasks.distillation import Distillation
from memfold.training.build import plain_config
from memfold.training.config_rules import check_config
from memfold.training.configured_callbacks import build_callbacks, refuse_wrong_monitors
from memfold.training.early_stopping import RunEarlyStopping
from memfold.training.schedules import Constant
from training.jobs import SMALL, compose_job

LIGHTNING = "lightning.pytorch.callbacks"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    return plain_config(compose_job(folder, *SMALL, "callbacks=early_stopping"))


def with_value(config: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    changed = deepcopy(config)
    *parents, name = key.split(".")
    place = changed
    for parent in parents:
        place = place[parent]
    place[name] = value
    return changed


def test_the_configuration_as_it_is_passes(config: dict[str, Any]) -> None:
    check_config(config)


@pytest.mark.parametrize("value", [0, 0.0])
def test_a_run_may_leave_the_test_set_unread(config: dict[str, Any], value: float) -> None:
    # As those on which settings are chosen do.
    check_config(with_value(config, "trainer.limit_test_batches", value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("trainer.max_epochs", value) for value in (None, 0, -1, 1.5, "3", True, [1], {})),
        *(("trainer.max_steps", value) for value in (None, 0, -2, 1.5, "many")),
        *(("trainer.min_steps", value) for value in (0, -1, "1")),
        *(("trainer.val_check_interval", value) for value in (0, 0.0, 1.5, -1, "00:00:01:00")),
        *(("trainer.check_val_every_n_epoch", value) for value in (0, -1, 0.5, "x")),
        *(("trainer.limit_val_batches", value) for value in (0, 0.0, 2.5, "all")),
        *(("trainer.limit_test_batches", value) for value in (False, -1)),
        *(("trainer.limit_train_batches", value) for value in (0, 1.01, True)),
        *(("trainer.num_sanity_val_steps", value) for value in (None, -2, 0.5)),
        ("trainer.fast_dev_run", True),
        ("trainer.overfit_batches", 2),
        ("trainer.barebones", True),
        ("trainer.reload_dataloaders_every_n_epochs", 1),
        ("trainer.use_distributed_sampler", True),
        *(("callbacks.early_stopping.patience", value) for value in (None, -1, 1.5, "3")),
        *(("callbacks.early_stopping.min_delta", v) for v in (float("nan"), -1, None, "x")),
        *(("optimizer.lr", value) for value in (1e308, 10**5000, float("inf"), None, "fast", [1])),
        *(("optimizer.momentum", value) for value in (1.5, -0.1, float("nan"))),
        ("optimizer.dampening", float("nan")),
        ("scheduler.milestones", [1, float("inf")]),
        ("backbone.width", 10**30),
        ("checkpoint", None),
        ("checkpoint", {"asynchronous": True, "more": 1}),
        ("checkpoint.asynchronous", "yes"),
        ("artifact", 8),
        ("artifact.train_bits", "4"),
        ("artifact.train_bits_from", 1.5),
        ("artifact.coding", "zip"),
        ("artifact.block_size", None),
        ("sweep", None),
        ("resume", 5),
        ("extras.traceback", "yes"),
        ("extras", None),
        ("distill", None),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, int) else str(value % 10**9),
)
def test_values_out_of_range_are_named_in_one_line(
    config: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(InputError, match=key.replace(".", r"\.")) as caught:
        check_config(with_value(config, key, value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "key", ["distill", "checkpoint", "extras", "seed", "resume", "trainer.max_epochs", "callbacks"]
)
def test_what_was_deleted_is_named(config: dict[str, Any], key: str) -> None:
    changed = with_value(config, key, None)
    group, _, name = key.partition(".")
    del (changed[group] if name else changed)[name or group]
    with pytest.raises(InputError, match=rf"{key} (is missing|must be one of)"):
        check_config(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "abc"}, r"callbacks\.x must be a callback, .* or null, got 'abc'"),
        ({"x": {"_target_": "torch.nn.Linear"}}, "gives lightning's Callback"),
        (
            {"x": {"_target_": f"{LIGHTNING}.GradientAccumulationScheduler", "scheduling": {0: 2}}},
            r"callbacks\.x: GradientAccumulationScheduler .*trainer\.accumulate_grad_batches",
        ),
        (
            {"x": {"_target_": f"{LIGHTNING}.StochasticWeightAveraging", "swa_lrs": 0.1}},
            "changes the weights after they have been validated",
        ),
        ({"x": {"_target_": f"{LIGHTNING}.EMAWeightAveraging"}}, "callbacks=ema averages"),
        ({"x": {"_target_": f"{LIGHTNING}.LearningRateFinder"}}, "another learning rate"),
        ({"x": {"_target_": f"{LIGHTNING}.BatchSizeFinder"}}, "another batch size"),
    ],
    ids=str,
)
def test_callbacks_that_a_run_cannot_follow_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_callbacks(options, TASK)
    assert build_callbacks({"x": None}, TASK) == []


TASK = Classification(DataSpec(Images(1, 1, 1), Classes(2)), label_smoothing=0.0)


class OfTheUser(Callback):
    """It may log anything."""


def test_monitors_must_be_metrics_and_have_their_direction() -> None:
    def directions(teacher: Distillation | None = None) -> dict[str, str]:
        net, schedule = nn.Linear(1, 2), Constant().attach
        return TaskModule(net, TASK, lambda _: None, schedule, teacher).directions  # type: ignore

    def stop(monitor: str, mode: str) -> RunEarlyStopping:
        return RunEarlyStopping(monitor, mode=mode)

    refuse_wrong_monitors(
        [stop("val/loss", "min"), stop("train/acc", "max"), Timer()], directions()
    )
    with pytest.raises(InputError, match=r"monitor=train/distill_loss, which is no metric"):
        refuse_wrong_monitors([stop("train/distill_loss", "min")], directions())
    teacher = Distillation(nn.Linear(1, 2), temperature=4.0, weight=0.9)
    refuse_wrong_monitors([stop("train/distill_loss", "min")], directions(teacher))
    refuse_wrong_monitors([stop("mine", "max"), OfTheUser()], directions())
    with pytest.raises(InputError, match=r"monitor=val/accuracy, which is no metric; .*val/acc"):
        refuse_wrong_monitors([stop("val/accuracy", "max")], directions())
    with pytest.raises(InputError, match="monitor=val/loss and mode=max; it needs mode=min"):
        refuse_wrong_monitors([stop("val/loss", "max"), OfTheUser()], directions())


def test_custom_backbones_take_arguments_either_way(tmp_path: Path) -> None:
    for number, override in enumerate(("backbone.args={width: 48}", "+backbone.args.width=48")):
        names = ("backbone=custom", "backbone.target=memfold.backbones.MLP", override)
        cfg = compose_job(tmp_path / str(number), "logger=csv", *names)
        assert plain_config(cfg)["backbone"]["args"] == {"width": 48}
