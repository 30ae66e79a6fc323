"""A number that tells whether values fit a mapping."""

from memfold.compression.strategy import Strategy
from memfold.seeding import derive_seed
from memfold.strategies.sharing.mapping import SlotMapping

__all__ = ["fingerprint"]

# Options that the fingerprint holds as what they led to, or that do not change what values mean.
_FREE_OPTIONS = frozenset(
    (
        "ratio",
        "budget_bytes",
        "bits",
        "gradient_scale",
        "include",
        "exclude",
        "min_size",
        "structured",
        "autograd",
        "linear",
    )
)


def fingerprint(strategy: Strategy, mapping: SlotMapping) -> int:
    """Hash what the values mean; the order of the tensors, their names and shapes included."""
    options = {key: value for key, value in strategy.to_dict().items() if key not in _FREE_OPTIONS}
    parts = [f"{key}={options[key]}" for key in sorted(options)]
    shapes = [f"{span.name}{tuple(span.shape)}" for span in mapping.spans]
    return derive_seed(*parts, mapping.num_slots, *shapes)
