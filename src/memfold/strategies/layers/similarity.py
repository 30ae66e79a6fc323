"""What layers compute tells which of them are alike: a map of tied layers, and which may go.

Kornblith et al., "Similarity of neural network representations revisited", ICML 2019, arXiv
1905.00414: linear CKA. Zhang et al., "CRaSh: clustering, removing, and sharing enhance fine-tuning
without full large language model", EMNLP 2023, arXiv 2310.15477: the map.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from memfold.compression.samples import take_batches
from memfold.errors import InputError
from memfold.strategies.layers.repeated import repeated_layers

__all__ = ["crash_map", "kept_layers", "layer_features", "linear_cka", "map_of"]


def crash_map(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    num_own: int,
    *,
    layers: str | None = None,
    num_samples: int = 512,
) -> tuple[int, ...]:
    """Return a map for `tied` and `recursive_lora`, with the layers whose weights stay as entries.

    Neighbours become clusters as long as there are more than K: each time the two are joined of
    which the last layer of the first and the first layer of the second are most alike. The layer
    in the middle of a cluster stays; a position uses the nearest that does, the later of two.

    Args:
        model: Trained, not compressed: `memfold.densify` makes it so.
        data: Batches of (input, target).
        num_own: K, the layers that stay, at most as many as there are.
        layers: See `repeated_layers`.
        num_samples: Of the data.

    Returns:
        For each repeated layer, which one's weights it uses.

    Raises:
        InputError: There are no repeated layers, fewer than K of them, no two samples, or a layer
            that tells none of them apart.
    """
    features = layer_features(model, data, layers=layers, num_samples=num_samples)
    return map_of([linear_cka(one, other) for one, other in pairwise(features)], num_own)


def map_of(similarities: Sequence[float], num_own: int) -> tuple[int, ...]:
    """Return the map for L layers of which L - 1 pairs of neighbours are so alike; `crash_map`.

    Raises:
        InputError: There are fewer than K.
    """
    length = len(similarities) + 1
    if not 1 <= num_own <= length:
        raise InputError(
            f"a map of {length} repeated layers keeps 1 to {length} of them, not {num_own}"
        )
    # Joining changes no similarity: the pairs that are the least alike stay apart.
    order = sorted(range(length - 1), key=lambda place: -similarities[place])
    cuts = sorted(place + 1 for place in order[length - num_own :])
    ends = [0, *cuts, length]
    kept = [start + (end - start) // 2 for start, end in pairwise(ends)]
    return tuple(min(kept, key=lambda own: (abs(own - place), -own)) for place in range(length))


def kept_layers(similarities: Sequence[float], num_dropped: int) -> tuple[int, ...]:
    """Return the layers that stay when those go whose outputs are most like their inputs.

    Args:
        similarities: Of L - 1 pairs of neighbours; that of a layer's output and its input is that
            of the layer before it and itself. The first layer stays.
        num_dropped: How many go.

    Raises:
        InputError: There are fewer than that beside the first.
    """
    length = len(similarities) + 1
    if not 0 <= num_dropped < length:
        raise InputError(
            f"of {length} repeated layers 0 to {length - 1} can be dropped, not {num_dropped}"
        )
    order = sorted(range(1, length), key=lambda layer: -similarities[layer - 1])
    return tuple(sorted({0, *order[num_dropped:]}))


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Return how alike features of the same samples are: linear CKA, 0 to 1.

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) for columns that are centred. It is the same for
    features that are rotated or scaled.

    Args:
        one: X (N, d).
        other: Y (N, e).

    Raises:
        InputError: There is nothing to compare: features of all samples are equal.
    """
    one, other = (x.double() - x.double().mean(0) for x in (one, other))
    own = [(x.T @ x).norm() for x in (one, other)]
    if min(own) == 0:
        raise InputError("layers cannot be compared that give the same for all samples")
    return float((other.T @ one).square().sum() / (own[0] * own[1]))


def layer_features(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    layers: str | None = None,
    num_samples: int = 512,
) -> list[Tensor]:
    """Return what each repeated layer gives for samples, in evaluation, the mean over tokens.

    Args:
        model: Any; its modes stay as they are.
        data: Batches of (input, target).
        layers: See `repeated_layers`.
        num_samples: N.

    Returns:
        Of each layer (N, d): float64, on the CPU.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in repeated_layers(model, layers)}
    batches = take_batches("layer_features", data, num_samples=num_samples)
    modes = [(module, module.training) for module in model.modules()]
    handles = [
        model.get_submodule(path).register_forward_hook(partial(_note, seen))
        for path, seen in found.items()
    ]
    model.eval()
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                model(inputs.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return [torch.cat(seen) for seen in found.values()]


def _note(seen: list[Tensor], layer: nn.Module, inputs: Any, output: Any) -> None:
    """Keep the mean over all dimensions between samples and features."""
    stream = output[0] if isinstance(output, tuple) else output
    tokens = stream.double().cpu().unsqueeze(1).flatten(1, -2)  # (N, T, d)
    seen.append(tokens.mean(1))
