"""The optimizer of a run, from its configuration and the network that it trains."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from memfold.compression import Strategy, compression_of
from memfold.errors import InputError
from memfold.strategies import strategy_class, strategy_names
from memfold.training.instantiate import instantiate, target_of
from memfold.training.muon import Muon
from memfold.training.parameter_groups import Decay, hidden_matrices, parameter_groups

__all__ = ["optimizer_factory", "refuse_muon_without_matrices"]


def optimizer_factory(config: Mapping[str, Any]) -> Callable[[nn.Module, int], Optimizer]:
    """Return what makes the optimizer of a network with so many outputs.

    Args:
        config: The group `optimizer`, plain values.

    Raises:
        InputError: An option is wrong; a mistake is found before there is a network.
    """
    decay: Any = config.get("decay")
    options = {key: value for key, value in config.items() if key != "decay"}
    if decay not in get_args(Decay):
        raise InputError(f"optimizer.decay={decay}: must be one of {', '.join(get_args(Decay))}")

    def make(parameters: object) -> Optimizer:
        return instantiate(options, "optimizer", Optimizer, params=parameters)

    is_muon = isinstance(make([nn.Parameter(torch.zeros(1))]), Muon)

    def optimizer_of(net: nn.Module, num_outputs: int) -> Optimizer:
        apart = hidden_matrices(net, num_outputs) if is_muon else ()
        optimizer = make(parameter_groups(net, decay, apart))
        compression = compression_of(net)
        if isinstance(optimizer, Muon) and compression is not None:
            optimizer.entries = compression.entries
        return optimizer

    return optimizer_of


def refuse_muon_without_matrices(config: Mapping[str, Any]) -> None:
    """Check that there are matrices to train where the optimizer needs some.

    Args:
        config: The resolved configuration, plain values; nothing is built.

    Raises:
        InputError: The strategy trains something else, or each process has a share of a matrix.
    """
    if target_of(config["optimizer"], "optimizer") is not Muon:
        return
    strategy: Strategy = instantiate(config["compression"], "compression", Strategy)
    if not strategy.trains_matrices:
        others = [name for name in strategy_names() if strategy_class(name).trains_matrices]
        raise InputError(
            f"optimizer=muon makes the steps of matrices orthogonal, and compression="
            f"{strategy.name} trains no matrices: take adamw or sgd (muon is for "
            f"{', '.join(others)})"
        )
    if "fsdp" in str(config["trainer"].get("strategy")).lower():
        raise InputError(
            "optimizer=muon with trainer=fsdp: it needs whole matrices, of which each process has "
            "a share; use trainer=ddp"
        )
