"""Kinds of weight matrices in a transformer's layer, by the names that libraries give them."""

from collections.abc import Sequence

from torch import nn

from memfold.compression.selection import sample_names, select_weights
from memfold.errors import InputError

__all__ = ["ATTENTION", "patterns_of"]

# One matrix for queries, keys and values.
_FUSED = ("*qkv*", "*c_attn", "*in_proj_weight", "*query_key_value")
_KINDS = {
    "q": ("*q_proj", "*q_proj_weight", "*query", "*to_q", "*q_lin", *_FUSED),
    "k": ("*k_proj", "*k_proj_weight", "*key", "*to_k", "*k_lin", *_FUSED),
    "v": ("*v_proj", "*v_proj_weight", "*value", "*to_v", "*v_lin", *_FUSED),
    "o": (
        *("*o_proj", "*out_proj", "*out_lin", "*attention.output.dense", "*to_out"),
        *("*attn.c_proj", "*attention.projection", "*attn.proj"),
    ),
}
ATTENTION = ("*attn*", "*attention*", *(p for patterns in _KINDS.values() for p in patterns))
"""Patterns of what belongs to attention."""


def patterns_of(model: nn.Module, include: Sequence[str]) -> tuple[str, ...]:
    """Replace `q`, `k`, `v` and `o` by patterns that the model's weights match.

    Args:
        model: The root module.
        include: Such kinds, and patterns, which stay.

    Raises:
        InputError: The model has no weight of a kind.
    """
    weights = select_weights(model)
    found: dict[str, None] = {}
    for kind in include:
        if kind not in _KINDS:
            found[kind] = None
            continue
        matching = [p for p in _KINDS[kind] if any(weight.matches(p) for weight in weights)]
        if not matching:
            raise InputError(
                f"compression.include={kind}: no weight of this model is called as such a "
                f"projection is; name them with patterns, it has "
                f"{sample_names([weight.name for weight in weights])}"
            )
        found |= dict.fromkeys(matching)
    return tuple(found)
