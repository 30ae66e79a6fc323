"""The network of a run and its task, from the configuration and what the data are."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from memfold.backbones.facts import named_facts
from memfold.compression import Context, Strategy
from memfold.data.data_module import DataModule
from memfold.data.spec import DataSpec
from memfold.errors import InputError
from memfold.tasks import Task
from memfold.training.instantiate import instantiate, target_of

__all__ = ["build_backbone", "build_network", "build_task"]


def build_backbone(options: Mapping[str, Any], spec: DataSpec) -> nn.Module:
    """Build the dense backbone that `options` describe, for data like `spec`.

    Raises:
        InputError: It refuses its options, or is for other data.
    """
    target = target_of(options, "backbone")
    facts = named_facts(target, spec, f"backbone={target.__name__}")
    return instantiate(options, "backbone", nn.Module, **facts)


def build_task(options: Mapping[str, Any], spec: DataSpec) -> Task:
    """Build the task that `options` describe, for data like `spec`.

    Raises:
        InputError: It refuses its options, or is for other data.
    """
    return instantiate(options, "task", Task, spec=spec)


def build_network(
    config: Mapping[str, Any],
    data: DataModule,
    task: Task,
    start: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, Strategy, int]:
    """Build the backbone for `data` and compress it.

    Args:
        config: `backbone`, `compression` and `seed`, plain values.
        data: What it is for; read by the strategies that look at data.
        task: What it is to learn.
        start: See `Context.start`.

    Returns:
        The compressed network, the strategy, and the number of parameters before.

    Raises:
        InputError: Backbone or strategy refuse their options, or do not fit each other.
    """
    strategy: Strategy = instantiate(config["compression"], "compression", Strategy)
    net = build_backbone(config["backbone"], task.spec)
    for name, parameter in net.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"backbone: {name} has no shape yet, as lazy modules; call the network on a batch "
                "before it is returned"
            )
    task.check_network(net)
    num_dense_parameters = sum(parameter.numel() for parameter in net.parameters())
    strategy.compress(net, Context(data.scoring_batches(config["seed"]), task.loss, start))
    return net, strategy, num_dense_parameters
