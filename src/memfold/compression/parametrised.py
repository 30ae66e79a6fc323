"""Weights that others are computed from: weight norm, spectral norm, PyTorch's own pruning.

PyTorch has two ways. `torch.nn.utils.parametrize` computes a weight whenever it is read; the older
functions keep it as a plain attribute, which a hook computes again before each forward pass.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList

from memfold.compression.selection import CompressibleWeight, Owner, plain_tensors
from memfold.errors import InputError

__all__ = ["Parametrised", "check_parametrised", "copy_model"]

Parametrised = Literal["any", "stateless", "none"]


def check_parametrised(weights: Sequence[CompressibleWeight], taken: Parametrised) -> None:
    """Check that a strategy can replace what other weights are computed from.

    Args:
        weights: To be replaced.
        taken: `any`, where the values stay as they are; `stateless`, all that
            `torch.nn.utils.parametrize` computes without numbers that belong to the values of that
            moment, as spectral norm's singular vectors do; or `none`.

    Raises:
        InputError: It cannot. The message says how to make the weight a plain one.
    """
    if taken == "any":
        return
    for owner in (owner for weight in weights for owner in weight.owners):
        remedy = _remedy(owner, taken)
        if remedy is not None:
            attribute, remove, pattern = remedy
            raise InputError(
                f"{owner.name} is what {attribute} is computed from, and new values or zeros there "
                f"do not suit every such computation: call torch.nn.utils.{remove} first, or add "
                f"{pattern!r} to compression.exclude"
            )


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model deeply, also where its last forward pass left results in plain attributes.

    `copy.deepcopy` refuses tensors that have a graph; the copy has their values without it.

    Args:
        model: Any module.
        memo: As for `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    for _, tensor in plain_tensors(model):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    return deepcopy(model, memo)


def _remedy(owner: Owner, taken: Parametrised) -> tuple[str, str, str] | None:
    """Return what is computed, the function that ends it, and the pattern that means it.

    `None` for a weight that is used as it is, or that is taken.
    """
    module = owner.module
    if isinstance(module, ParametrizationList):
        if taken == "stateless" and not list(module.buffers()):
            return None
        attribute = owner.path.replace("parametrizations.", "")
        return attribute, "parametrize.remove_parametrizations", "*parametrizations*"
    stem, _, suffix = owner.attribute.rpartition("_")
    if suffix not in ("v", "orig") or not isinstance(vars(module).get(stem), Tensor):
        return None
    remove = "remove_weight_norm" if suffix == "v" else "remove_spectral_norm"
    if suffix == "orig" and prune.is_pruned(module):
        remove = "prune.remove"
    return owner.name.removesuffix(f"_{suffix}"), remove, f"*{owner.attribute}"
