"""Which of K layers' weights each of L positions uses.

Takase and Kiyono, "Lessons on parameter sharing across layers in transformers" (2021, arXiv
2104.06022): sequence, cycle, cycle (rev). Lan et al., "ALBERT" (2020, arXiv 1909.11942): groups.
Reid et al., "Subformer" (2021, arXiv 2101.00234): sandwich. Bae et al., "Mixture-of-recursions"
(2025, arXiv 2507.10524): middle-cycle, middle-sequence.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from memfold.errors import InputError

__all__ = ["Entries", "LayerMap", "check_map", "depths_of", "layer_map", "looped_map"]

LayerMap = Literal[
    "cycle", "sequence", "cycle_rev", "middle_cycle", "middle_sequence", "albert", "sandwich"
]
Entries = tuple[int, ...]
"""For each position, the layer whose weights it uses."""


def depths_of(name: LayerMap, num_layers: int) -> list[int]:
    """Return the numbers K of layers with weights of their own that a map has, ascending.

    Args:
        name: Of the map.
        num_layers: L.
    """
    inner = num_layers - 2
    match name:
        case "cycle" | "sequence" | "cycle_rev":
            return [k for k in range(1, num_layers + 1) if num_layers % k == 0]
        case "middle_cycle" | "middle_sequence":
            return [2 + k for k in range(1, inner + 1) if inner % k == 0]
        case "albert":
            return list(range(1, num_layers + 1))
        case "sandwich":
            return [3] if inner > 0 else []


def layer_map(name: LayerMap | Entries, num_layers: int, num_own: int) -> Entries:
    """Return m with m[l] in 0..K-1, the layer whose weights position l uses.

    Args:
        name: `cycle`: l mod K. `sequence`: l // (L / K). `cycle_rev`: a cycle whose last round goes
            backwards. `middle_cycle`, `middle_sequence`: the first and the last position have their
            own, the others follow the rule. `albert`: l K // L, groups of neighbours that need not
            be equal. `sandwich`: first, last, and one for all between. Or entries: see `check_map`.
        num_layers: L.
        num_own: K, one of `depths_of`.
    """
    if isinstance(name, tuple):
        return check_map(name, num_layers)
    cycle = tuple(place % num_own for place in range(num_layers))
    match name:
        case "cycle":
            return cycle
        case "cycle_rev":
            last = num_layers - num_own
            return (*cycle[:last], *reversed(cycle[last:])) if last else cycle
        case "sequence" | "albert":
            return tuple(place * num_own // num_layers for place in range(num_layers))
        case "sandwich" | "middle_cycle" | "middle_sequence":
            rule: LayerMap = "cycle" if name == "middle_cycle" else "sequence"
            inner = layer_map(rule, num_layers - 2, num_own - 2)
            return (0, *(1 + number for number in inner), num_own - 1)


def looped_map(name: LayerMap | Entries, num_layers: int, loops: int) -> Entries:
    """Return the map of that name in which `loops` layers, at most, use the same weights.

    Of several (`albert`), it is the one with the fewest weights. Entries are as they are.

    Raises:
        InputError: There is none.
    """
    if isinstance(name, tuple):
        return check_map(name, num_layers)
    found = {}
    for own in depths_of(name, num_layers):
        entries = layer_map(name, num_layers, own)
        found.setdefault(max(Counter(entries).values()), entries)
    if loops not in found:
        raise InputError(
            f"compression.loops={loops}: {num_layers} layers in compression.map={name} can share "
            f"in loops of {', '.join(map(str, sorted(found))) or 'no number'}"
        )
    return found[loops]


def check_map(entries: Sequence[int], num_layers: int) -> Entries:
    """Return a map that a user wrote, with its layers numbered in the order of their first use.

    Args:
        entries: For each position, the layer whose weights it uses.
        num_layers: L.

    Raises:
        InputError: It has another length, or names a layer that does not exist.
    """
    if len(entries) != num_layers:
        raise InputError(
            f"compression.map has {len(entries)} entries, one for each of the {num_layers} "
            "repeated layers is needed"
        )
    unknown = [entry for entry in entries if not 0 <= entry < num_layers]
    if unknown:
        raise InputError(
            f"compression.map names layer {unknown[0]}; the repeated layers are 0 to "
            f"{num_layers - 1}"
        )
    order = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    return tuple(order[entry] for entry in entries)
