"""MLPs with several experts: each token runs through those that a router chooses for it.

The matrices of an MLP hold a weight for each expert. A hook before the first of them sorts tokens
by their experts, so that whatever stands between two matrices (it must act on each token alone)
sees rows; a hook behind the last one puts the rows back, weighted. All layers have one router. All
of this stays out of compiled graphs, one of which need not see what another has left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import
from torch.nn import functional as F

from memfold.errors import InputError

__all__ = ["ROUTER", "Experts", "Mlp", "Routes"]

ROUTER = "expert_router"
"""Parameter of the root: (d, E), without a bias."""


class Mlp(NamedTuple):
    """The matrices of a layer's MLP."""

    first: tuple[nn.Module, ...]
    """Those that take the layer's stream: one, or two where one gates the other."""
    last: nn.Module
    width: int
    """d, of the stream."""

    @staticmethod
    def of(model: nn.Module, names: Sequence[str]) -> "Mlp":
        """Find them by the names of their weights, the last one last.

        Raises:
            InputError: They are not linear layers, or their sizes are not those of an MLP.
        """
        *first, last = (model.get_submodule(name.rpartition(".")[0]) for name in names)
        sizes = {_sizes(module) for module in first}
        back = _sizes(last)
        if back is None or sizes != {back[::-1]}:
            raise InputError(
                f"widenet: {', '.join(names)} are no MLP, whose first matrices are linear layers "
                "of equal sizes and whose last one leads back; name its matrices with "
                "compression.mlp"
            )
        return Mlp(tuple(first), last, back[1])


@dataclass(frozen=True)
class Routes:
    """How a router chooses."""

    per_token: int
    """K, experts of a token."""
    noise: float
    """Times 1/E, the deviation of what is added to its logits in training."""
    renormalise: bool
    """Whether the K probabilities are made to sum to 1."""
    capacity: float | None
    """Times K/E of the tokens, what an expert takes at most, or 1; the others leave it out."""


class _Routing(NamedTuple):
    layer: int
    inputs: Tensor
    """(..., d)"""
    rows: Tensor
    """(R, d), token after token for each expert."""
    slots: Tensor
    """(R,), of K tokens each: choice times tokens, plus token."""
    gates: Tensor
    """(R, 1)"""
    counts: list[int]
    """Rows of each expert."""


class _Running(local):
    """What a thread's pass is in. A copy is in none."""

    def __init__(self) -> None:
        self.routing: _Routing | None = None
        self.balance: dict[int, Tensor] = {}
        """By layer, of the pass just done if that was one in training."""

    def __reduce__(self) -> tuple[type["_Running"], tuple[()]]:
        return _Running, ()


class Experts:
    """Runs the MLPs of a model's layers through experts."""

    def __init__(self, root: nn.Module, mlps: Sequence[Mlp], routes: Routes) -> None:
        """Take note of the matrices, which hold E weights each: (E, ...)."""
        self.root = root
        self.mlps = mlps
        self.routes = routes
        self._running = _Running()

    def connect(self) -> None:
        """Change what the model computes, from now on, in copies and pickles too."""
        self.root.register_forward_pre_hook(self._enter)
        self.root.register_forward_hook(self._leave, always_call=True)
        for number, (first, last, _) in enumerate(self.mlps):
            for module in (*first, last):
                module.__dict__["forward"] = partial(self._multiply, module)
            for module in first:
                module.register_forward_pre_hook(partial(self._distribute, number))
            last.register_forward_hook(partial(self._collect, number))

    def balance(self) -> Tensor | None:
        """Return E times the sum over experts of their share of tokens times their mean chance.

        Summed over layers, for the pass just done: 1 each where all experts are alike. `None` if
        that was not in training.
        """
        terms = list(self._running.balance.values())
        return torch.stack(terms).sum() if terms else None

    @_disable_dynamo
    def _enter(self, root: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._running.balance = {}

    @_disable_dynamo
    def _leave(self, root: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Let go of what a pass that has failed was in: then there is no output."""
        routing, self._running.routing = self._running.routing, None
        if routing is not None and output is not None:
            raise _not_alike()

    @_disable_dynamo
    def _distribute(
        self, layer: int, module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor]:
        routing, (stream,) = self._running.routing, inputs
        if routing is None or routing.layer != layer:
            routing = self._running.routing = self._route(layer, stream, module.training)
        elif routing.inputs is not stream:
            raise _not_alike()
        return (routing.rows,)

    @_disable_dynamo
    def _multiply(self, module: Any, rows: Tensor) -> Tensor:
        routing, weights = self._running.routing, module.weight
        if routing is None or rows.shape[:-1] != routing.slots.shape:
            raise _not_alike()
        if type(module).__name__ == "Conv1D":  # of transformers: (columns, rows)
            weights = weights.mT
        parts = zip(rows.split(routing.counts), weights, strict=True)
        return torch.cat([F.linear(part, weight, module.bias) for part, weight in parts])

    @_disable_dynamo
    def _collect(
        self, layer: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        routing, self._running.routing = self._running.routing, None
        if routing is None or routing.layer != layer:
            raise _not_alike()
        *shape, width = *routing.inputs.shape[:-1], output.shape[-1]
        num_slots = self.routes.per_token * routing.inputs[..., 0].numel()
        weighted = output * routing.gates.to(output.dtype)
        slots = output.new_zeros(num_slots, width).index_copy(0, routing.slots, weighted)
        return slots.view(self.routes.per_token, *shape, width).sum(0)

    def _route(self, layer: int, stream: Tensor, training: bool) -> _Routing:
        router = getattr(self.root, ROUTER)
        tokens, num_experts = stream.flatten(0, -2), router.shape[1]
        with torch.autocast(stream.device.type, enabled=False):
            kind = torch.promote_types(router.dtype, torch.float32)
            logits = tokens.to(kind) @ router.to(kind)
        if training and self.routes.noise:
            logits = logits + torch.randn_like(logits) * (self.routes.noise / num_experts)
        chances = logits.softmax(-1)
        gates, chosen = chances.topk(self.routes.per_token)
        if self.routes.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        experts = chosen.T.flatten()  # first choices come first
        counts = experts.bincount(minlength=num_experts)
        shares = counts.to(chances.dtype) / len(experts)
        balance = num_experts * (shares * chances.mean(0)).sum()
        # A layer that is computed again in a backward pass has said so before.
        if training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._running.balance[layer] = balance
        slots = experts.argsort(stable=True)
        if self.routes.capacity is not None:
            most = max(1, int(self.routes.capacity * len(experts) / num_experts))
            starts = counts.cumsum(0) - counts
            places = torch.arange(len(slots), device=slots.device) - starts[experts[slots]]
            slots, counts = slots[places < most], counts.clamp(max=most)
        gates = gates.T.flatten()[slots, None]
        rows = tokens[slots % len(tokens)]
        return _Routing(layer, stream, rows, slots, gates, counts.tolist())


def _sizes(module: nn.Module) -> tuple[int, ...] | None:
    """Return inputs and outputs of a linear layer, that of transformers' own kind included."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.in_features, module.out_features
    is_linear = type(module).__name__ == "Conv1D"
    return tuple(module.get_parameter("weight").shape) if is_linear else None


def _not_alike() -> InputError:
    return InputError(
        "widenet: experts cannot run through an MLP whose first matrices do not take the same "
        "input, or between whose matrices stands more than functions of a token alone"
    )
