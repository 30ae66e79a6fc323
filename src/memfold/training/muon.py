"""Muon for matrices, AdamW for everything else, as one optimizer.

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the length of
a step is that of Liu et al., "Muon is scalable for LLM training", 2025, arXiv 2502.16982:

    M <- mu M + (1 - mu) G,   W <- (1 - lr lambda) W - lr 0.2 sqrt(max(rows, columns)) O

where O is (1 - mu) G + mu M with all singular values near 1. Every entry of W then moves about as
far as AdamW would move it, so that one learning rate and one weight decay serve both.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from memfold.errors import InputError
from memfold.options import Interval, NonNegative, Positive, check_arguments

__all__ = ["Entries", "Muon", "orthogonalised"]

Entries = Mapping[Tensor, tuple[Sequence[int], Tensor]]
"""A parameter (N,) -> the shape of the matrix that its numbers are of, and their flat positions in
it, int64 (N,)."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of s, s^3 and s^5: singular values from 0.001 to 1 come near 1 in five rounds."""
_NUM_ROUNDS = 5
_RMS_OF_ADAMW = 0.2


class Muon(Optimizer):
    """Takes Muon's step where a group has `apart` set, AdamW's elsewhere.

    A tensor of more than two dimensions is the matrix of its first against all others.
    """

    entries: Callable[[], Entries] = dict
    """Which parameters are some entries of a matrix, the others being 0: read before each step."""

    def __init__(
        self,
        params: Any,
        *,
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.1,
        momentum: Annotated[float, Interval("[0, 1)")] = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: Positive = 1e-8,
    ) -> None:
        """Prepare the groups.

        Args:
            params: Parameters, or groups of them.
            lr: Learning rate of both.
            weight_decay: Of both, times the learning rate.
            momentum: mu, of Muon.
            betas: Of AdamW.
            eps: Of AdamW.

        Raises:
            InputError: An option is out of range.
        """
        check_arguments(Muon.__init__, locals(), "optimizer.")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"optimizer.betas={list(betas)}: each must be in [0, 1)")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "apart": False,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; return what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = self.entries()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if group["apart"]:
                for parameter in trained:
                    self._step_matrix(parameter, group, entries.get(parameter))
            else:
                self._step_others(trained, group)
        return loss

    def _step_matrix(
        self,
        parameter: Tensor,
        group: Mapping[str, Any],
        entries: tuple[Sequence[int], Tensor] | None,
    ) -> None:
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None
        assert parameter.dim() > 1 or entries is not None
        buffer = self._kept(parameter, "momentum_buffer").lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum)
        shape, positions = (parameter.shape, None) if entries is None else entries
        if positions is not None:
            update = update.new_zeros(prod(shape)).index_copy_(0, positions, update)
        matrix = update.view(shape[0], -1)
        direction = orthogonalised(matrix).reshape(-1)
        if positions is not None:
            direction = direction[positions]
        length = _RMS_OF_ADAMW * sqrt(max(matrix.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * length)

    def _step_others(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.tensor(0.0))
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self._kept(p, "exp_avg") for p in parameters],
            [self._kept(p, "exp_avg_sq") for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _kept(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz iterations.

    On a GPU in bfloat16, which is exact enough; on a CPU, which is slow with that, in the
    matrix's own dtype.

    Args:
        matrix: (rows, columns).

    Returns:
        The same shape and dtype.
    """
    first, third, fifth = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NUM_ROUNDS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return (x.mT if is_tall else x).to(matrix.dtype)
