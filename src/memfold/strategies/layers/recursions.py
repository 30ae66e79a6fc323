"""Tokens that go through the loops of a stack's middle more or less often, as a router says.

The tokens that a loop takes are gathered, row by row in their order, and put back behind it, so
that its layers compute those alone. Attention has to be causal: what fills up shorter rows stands
behind their tokens, which do not see it. Keys and values in a cache are of the tokens that a layer
has computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from threading import local
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import
from torch.nn import functional as F

from memfold.errors import InputError
from memfold.strategies.layers.loop_hooks import LoopHooks, split_stream

__all__ = ["ROUTER", "Recursions", "Routing", "check_causal"]

ROUTER = "recursion_router"
"""Parameter of the root: (loops, d), without a bias."""


@dataclass(frozen=True)
class Routing:
    """How tokens are chosen, and what becomes of them."""

    kind: Literal["expert", "token"]
    """Whether loops choose tokens, or tokens a number of loops."""
    capacity: Sequence[float]
    """Share of a row's tokens that each loop takes in training, if loops choose."""
    gate_scale: float | None
    """What a loop's sigmoid is multiplied by; `None` leaves gates out, those of tokens too."""


class _Tokens(NamedTuple):
    """The stream between two loops."""

    stream: Tensor
    """(B, T, d)"""
    chosen: Tensor
    """Those of the loop before, (B, T)."""
    first: Tensor
    """The stream before the first loop, where tokens choose."""
    depths: Tensor | None
    """Number of the last loop of each, where tokens choose."""
    gates: Tensor | None
    """(B, T); `None` where there are none."""


class _Kept(NamedTuple):
    """What a loop that runs needs."""

    tokens: _Tokens
    places: Tensor
    """Of the tokens taken, (B, N): where a row has fewer, of others behind."""
    is_taken: Tensor
    """Which of these are no others, (B, N)."""


class _Terms(local):
    """Of the loss, by loop, of a thread's pass just done if that was one in training."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type["_Terms"], tuple[()]]:
        return _Terms, ()


class Recursions(LoopHooks[_Tokens]):
    """Takes some tokens through each loop F; all others stay as they are.

    Loops choose: x <- x + p F(x) with p = gate_scale sigmoid(z), for those tokens among the ones
    of the loop before that have the largest z = r_i x, in training; those with z >= 0 otherwise,
    which no later token changes. A loop that takes all in training does so always.

    Tokens choose: i = argmax z, z = R x before the first loop, and x <- F(x) in loops before the
    i-th, x <- x_0 + softmax(z)_i F(x) in the i-th.

    Without gates x <- F(x).
    """

    def __init__(
        self,
        root: nn.Module,
        loops: Sequence[Sequence[nn.Module]],
        width: int,
        routing: Routing,
    ) -> None:
        """Take note of the layers: see `LoopHooks`."""
        super().__init__("mor", root, loops, width)
        self.routing = routing
        self._terms = _Terms()

    def connect(self) -> None:
        """See `LoopHooks.connect`."""
        super().connect()
        for layers in self.loops:
            for layer in layers:
                layer.register_forward_pre_hook(self._gather, with_kwargs=True)
                # Layers of transformers fail without any token; one that gives keys and values
                # beside the stream has to run.
                if signature(type(layer).forward).return_annotation is Tensor:
                    layer.__dict__["forward"] = partial(_skipped_without_tokens, layer)

    def loss(self) -> Tensor | None:
        """Return what the router is trained by beside the task, for the pass just done.

        Loops choose: the mean cross-entropy of sigmoid(z) with what was chosen, summed over loops.
        Tokens choose: loops times the sum over loops of their share of tokens times their mean
        chance. `None` if that pass was not in training.
        """
        terms = list(self._terms.found.values())
        return torch.stack(terms).sum() if terms else None

    def begin(self, stream: Tensor) -> _Tokens:
        """See `LoopHooks.begin`."""
        if stream.dim() != 3:
            raise InputError(
                f"mor: layers take {tuple(stream.shape)}; rows of tokens are needed, of shape "
                f"(rows, tokens, {self.width})"
            )
        rows, length, _ = stream.shape
        if rows * length == 0:
            raise InputError(f"mor: layers take {rows} rows of {length} tokens; one is needed")
        if length == 1 < rows and not self._is_training:
            raise _one_by_one(rows)
        self._terms.found = {}
        chosen = stream.new_ones(rows, length, dtype=torch.bool)
        if self.routing.kind == "expert":
            return _Tokens(stream, chosen, stream, None, None)
        chances = self._logits(stream, getattr(self.root, ROUTER)).softmax(-1)
        gates, depths = chances.max(-1)
        counts = depths.flatten().bincount(minlength=len(self.loops)).to(chances.dtype)
        self._note(0, len(self.loops) / depths.numel() * (counts * chances.mean((0, 1))).sum())
        is_gated = self.routing.gate_scale is not None
        return _Tokens(stream, chosen, stream, depths, gates if is_gated else None)

    def enter(self, number: int, streams: _Tokens) -> tuple[Tensor, _Kept]:
        """See `LoopHooks.enter`: (B, N, d) of the tokens that go on."""
        if streams.depths is None:
            tokens = self._choose(number, streams)
        else:
            tokens = streams._replace(chosen=streams.depths >= number)
        counts = tokens.chosen.sum(1, keepdim=True)
        order = tokens.chosen.byte().argsort(dim=1, descending=True, stable=True)
        places = order[:, : int(counts.max())]
        is_taken = torch.arange(places.shape[1], device=places.device) < counts
        return _gathered(tokens.stream, places), _Kept(tokens, places, is_taken)

    def leave(self, number: int, kept: _Kept, output: Tensor) -> _Tokens:
        """See `LoopHooks.leave`."""
        tokens, where = kept.tokens, kept.tokens.chosen.nonzero(as_tuple=True)
        found = output[kept.is_taken]
        if tokens.gates is not None:
            gated = tokens.gates[where].to(found.dtype)[:, None] * found
            if tokens.depths is None:
                found = tokens.stream[where] + gated
            else:
                is_last = (tokens.depths[where] == number)[:, None]
                found = torch.where(is_last, tokens.first[where] + gated, found)
        return tokens._replace(stream=tokens.stream.index_put(where, found.to(tokens.stream)))

    def end(self, streams: _Tokens) -> Tensor:
        """See `LoopHooks.end`."""
        return streams.stream

    @property
    def _is_training(self) -> bool:
        return self.loops[0][0].training

    def _choose(self, number: int, tokens: _Tokens) -> _Tokens:
        """Choose a loop's tokens among those of the loop before."""
        stream, before, capacity = tokens.stream, tokens.chosen, self.routing.capacity[number]
        logits = self._logits(stream, getattr(self.root, ROUTER)[number, None]).squeeze(-1)
        if self._is_training:
            count = max(1, int(capacity * stream.shape[1] + 1e-6))  # 0.29 of 100 are 29
            best = logits.masked_fill(~before, -torch.inf).topk(count, dim=1).indices
            chosen = torch.zeros_like(before).scatter(1, best, True)
            target = chosen[before].to(logits.dtype)
            self._note(number, F.binary_cross_entropy_with_logits(logits[before], target))
        else:
            chosen = before if capacity == 1 else before & (logits >= 0)
        scale = self.routing.gate_scale
        gates = None if scale is None else scale * logits.sigmoid()
        return tokens._replace(chosen=chosen, gates=gates)

    def _logits(self, stream: Tensor, router: Tensor) -> Tensor:
        with torch.autocast(stream.device.type, enabled=False):
            kind = torch.promote_types(router.dtype, torch.float32)
            return F.linear(stream.to(kind), router.to(kind))

    def _note(self, number: int, term: Tensor) -> None:
        if self._is_training and torch.is_grad_enabled():
            self._terms.found[number] = term

    @_disable_dynamo
    def _gather(
        self, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a layer what belongs to its tokens alone, such as their positions."""
        kept = self.kept
        if kept is None:  # another hook says so
            return None
        stream, others, options = split_stream(layer, inputs, options)
        _, _, *names = signature(type(layer).forward).parameters
        for name, value in [*zip(names, others, strict=False), *options.items()]:
            if "mask" in name and value is not None:
                raise InputError(
                    f"mor: {type(layer).__name__} is given {name}, but all tokens of a batch have "
                    "to see all those before: no padding, and attention that needs no mask for that"
                )
        of_tokens = partial(self._of_tokens, kept)
        options = {name: of_tokens(value) for name, value in options.items()}
        return (stream, *map(of_tokens, others)), options

    def _of_tokens(self, kept: _Kept, value: Any) -> Any:
        """Gather tensors of shape (1 or B, T) or (1 or B, T, n)."""
        rows, length, _ = kept.tokens.stream.shape
        if isinstance(value, tuple):
            if rows > 1 and not self._is_training and any(_is_cached(part) for part in value):
                raise _one_by_one(rows)
            return tuple(self._of_tokens(kept, part) for part in value)
        if not isinstance(value, Tensor) or value.dim() not in (2, 3):
            return value
        if value.shape[0] not in (1, rows) or value.shape[1] != length:
            return value
        return _gathered(value.expand(rows, *value.shape[1:]), kept.places)


def check_causal(layers: Sequence[nn.Module], path: str) -> None:
    """Check that layers say of their attention that a token sees none behind it.

    Raises:
        InputError: They do not.
    """
    found = [getattr(m, "is_causal", None) for layer in layers for m in layer.modules()]
    said = [value for value in found if isinstance(value, bool)]
    if not said or not all(said):
        raise InputError(
            f"mor: {path} has no causal attention (none whose is_causal is true), without which "
            "tokens cannot be left out: backbone=gpt has, and decoders of transformers"
        )


def _skipped_without_tokens(layer: Any, stream: Tensor, *inputs: Any, **options: Any) -> Any:
    if stream.shape[1] == 0:
        trained = [p for p in layer.parameters() if p.requires_grad]
        if trained and torch.is_grad_enabled():  # gradients of 0: DDP waits for one of each
            return stream + 0 * torch.stack([parameter.sum() for parameter in trained]).sum()
        return stream
    return type(layer).forward(layer, stream, *inputs, **options)


def _gathered(values: Tensor, places: Tensor) -> Tensor:
    """Take values (B, T, ...) at places (B, N): (B, N, ...)."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    return values[rows, places]


def _is_cached(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _one_by_one(rows: int) -> InputError:
    return InputError(
        f"mor: {rows} sequences of one token, as with a cache of keys and values, in which each "
        "has tokens of its own: only one sequence at a time can be generated with a cache"
    )
