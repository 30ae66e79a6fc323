"""What is left of a network when most of its weights are gone: layers, units and live paths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memfold.compression.compressed_model import densify
from memfold.compression.state import Compression
from memfold.strategies.pruning.flow import Pipes, ones_like_sample, total_flow
from memfold.strategies.pruning.replica import replicate, scoring_mode

__all__ = ["Health", "measure", "metrics_of"]

# So small that nothing saturates (ReLU6, tanh), so large that products of it do not underflow.
_TRICKLE = 2.0**-20


@dataclass(frozen=True)
class Health:
    """The state of a sparse structure."""

    densities: dict[str, float]
    """Name of a weight -> kept over all of its entries."""
    min_layer_count: int
    """Kept entries of the weight that has fewest."""
    collapsed_layers: int
    """Weights without a kept entry."""
    dead_units: int
    """Rows (dimension 0) and columns (dimension 1) of weights without a kept entry. A unit between
    two layers without weights on either side counts on both."""
    effective_density: float
    """Kept entries on a live path from the input to the output, over all entries."""

    def to_metrics(self) -> dict[str, float]:
        """Return names and values as they are logged."""
        return {
            "structure/effective_density": self.effective_density,
            "structure/min_layer_count": float(self.min_layer_count),
            "structure/collapsed_layers": float(self.collapsed_layers),
            "structure/dead_units": float(self.dead_units),
            **{f"density/{name}": density for name, density in self.densities.items()},
        }


def metrics_of(
    compression: Compression, masks: Sequence[Tensor], example: Tensor
) -> dict[str, float]:
    """Measure the health of what a compression keeps, as it is logged.

    Args:
        compression: Of a model.
        masks: Bool tensors of its weights' shapes: what is kept.
        example: See `measure`.
    """
    dense = densify(compression.model).cpu()
    kept = [mask.cpu() for mask in masks]
    return measure(compression.names, kept, dense, example).to_metrics()


def measure(
    names: Sequence[str], masks: Sequence[Tensor], dense: nn.Module, example: Tensor
) -> Health:
    """Measure the health of `masks`.

    A kept weight is live when the flow of `memfold.strategies.pruning.flow` passes through it in
    a network whose kept weights are all positive and whose biases are zero. Weights that only
    ever see padding are not live: a 3x3 kernel on a 1x1 map has one live entry.

    Args:
        names: State-dict names of the weights in `dense`.
        masks: Bool tensors of their shapes: what is kept.
        dense: The model with dense parameters, whose values do not matter; it stays as it is.
        example: A batch of inputs; of floating-point ones only the shape matters.
    """
    counts = [int(mask.sum()) for mask in masks]
    live = _count_live(names, masks, dense, example)
    return Health(
        densities={
            name: count / mask.numel()
            for name, count, mask in zip(names, counts, masks, strict=True)
        },
        min_layer_count=min(counts),
        collapsed_layers=counts.count(0),
        dead_units=sum(_count_dead_units(mask) for mask in masks),
        effective_density=live / sum(mask.numel() for mask in masks),
    )


def _count_dead_units(mask: Tensor) -> int:
    kernels = mask.flatten(2).any(2) if mask.dim() > 2 else mask
    return sum(int((~kernels.any(dim)).sum()) for dim in (0, 1))


def _count_live(
    names: Sequence[str], masks: Sequence[Tensor], dense: nn.Module, example: Tensor
) -> int:
    parameters = [dense.get_parameter(name) for name in names]
    device = parameters[0].device
    with scoring_mode(dense, device):
        copy, weights = replicate(dense, parameters, torch.float64)
        _open_all_pipes(copy)
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight.copy_(_mean_of_rows(mask))
        with Pipes(average_pooling=True):
            flow = total_flow(copy(ones_like_sample(example.to(device), value=_TRICKLE)))
        if not flow.requires_grad:
            return 0
        gradients = torch.autograd.grad(flow, weights, allow_unused=True)
    return sum(
        int(((gradient.abs() > 0) & mask.to(device)).sum())
        for gradient, mask in zip(gradients, masks, strict=True)
        if gradient is not None
    )


@torch.no_grad()
def _open_all_pipes(copy: nn.Module) -> None:
    """Give weights, norms and buffers values with which everything flows and nothing is added."""
    for name, parameter in copy.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(_mean_of_rows(torch.ones_like(parameter)))
        else:
            attribute = name.rpartition(".")[2]
            is_bias = attribute.startswith("bias") or attribute.endswith("bias")
            parameter.fill_(0.0 if is_bias else 1.0)
    for name, buffer in copy.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
        elif name.endswith("running_var"):
            buffer.fill_(1.0)


def _mean_of_rows(mask: Tensor) -> Tensor:
    """Return weights >= 0 that are positive where the mask is, and sum to 1 in every row."""
    rows = mask.double().flatten(1)
    return (rows / rows.sum(1, keepdim=True).clamp(min=1)).view(mask.shape)
