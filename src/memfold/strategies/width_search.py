"""Find the widths of a network that has a given size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from memfold.errors import InputError

__all__ = ["Limits", "find_widths"]

Widths = tuple[int, ...]
_MAX_SIZES = 1000
"""Sizes that are measured before the search gives up."""


@dataclass(frozen=True)
class Limits:
    """Sizes that will do."""

    target: int
    least: float
    most: float

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most


def find_widths(
    dense: Widths, measure: Callable[[Widths], int], limits: Limits, request: str, unit: str
) -> Widths:
    """Return widths whose size is within limits, as close to a uniform scaling as that allows.

    Where there are none and the target is the most, the largest size that was found below it.

    Args:
        dense: Widths that may not be exceeded. They are returned when the target is not below
            their size.
        measure: Widths -> size, which grows with each width.
        limits: Of the size.
        request: What was asked for, for the message.
        unit: Of the sizes, for the message.

    Raises:
        InputError: No widths were found, and sizes above the target would do as well; the message
            has the nearest sizes.
    """
    sizes: dict[Widths, int] = {}

    def size_of(widths: Widths) -> int:
        if widths not in sizes:
            sizes[widths] = measure(widths)
        return sizes[widths]

    if size_of(dense) <= limits.target:
        return dense
    narrowest = tuple(1 for _ in dense)
    if size_of(narrowest) > limits.most:
        raise InputError(
            f"{request} is out of reach: the narrowest network, with all widths 1, has "
            f"{size_of(narrowest)} {unit}, {limits.target} were asked for"
        )
    below, above, scale = _bisect(dense, size_of, limits.target, {})
    ends = [below, above]
    if not any(size_of(widths) in limits for widths in ends):
        # A coarse width moves between them: it stays on either side, the others make up for it.
        for end in (below, above):
            held = {i: width for i, width in enumerate(end) if below[i] != above[i]}
            ends += _bisect(dense, size_of, limits.target, held)[:2]
    fitting = [widths for widths in ends if size_of(widths) in limits]
    if fitting:
        return min(fitting, key=lambda widths: abs(size_of(widths) - limits.target))
    found = _repair(ends, dense, scale, size_of, limits, sizes)
    if found is not None:
        return found
    nearest = max((w for w, size in sizes.items() if size < limits.least), key=size_of)
    if limits.most == limits.target:  # a budget: less of it is better than no network
        return nearest
    smaller = size_of(nearest)
    larger = min(size for size in sizes.values() if size > limits.most)
    raise InputError(
        f"{request}: no widths were found that give {limits.target} {unit} within 2 %; the "
        f"nearest give {smaller} and {larger}"
    )


def _scaled(dense: Widths, scale: float, held: Mapping[int, int]) -> Widths:
    """Round each width times `scale`, with offsets spread over (0, 1) so that layers take turns.

    Narrow layers round up before wide ones: they cost little, and one channel matters more there.
    Widths that are `held`, by their index, are not scaled.
    """
    order = sorted(range(len(dense)), key=lambda index: dense[index], reverse=True)
    widths = list(dense)
    for place, index in enumerate(order):
        offset = (place + 0.5) / len(dense)
        widths[index] = max(1, min(dense[index], int(scale * dense[index] + offset)))
    for index, width in held.items():
        widths[index] = width
    return tuple(widths)


def _bisect(
    dense: Widths, size_of: Callable[[Widths], int], target: int, held: Mapping[int, int]
) -> tuple[Widths, Widths, float]:
    """Return the last widths with a size up to the target, the next ones, and their scale."""
    low, high = 0.0, 1.0

    def scaled(scale: float) -> Widths:
        return _scaled(dense, scale, held)

    while _num_changes(scaled(low), scaled(high)) > 1 and high - low > 1e-9:
        middle = (low + high) / 2
        if size_of(scaled(middle)) <= target:
            low = middle
        else:
            high = middle
    return scaled(low), scaled(high), high


def _num_changes(narrow: Widths, wide: Widths) -> int:
    return sum(b - a for a, b in zip(narrow, wide, strict=True))


def _repair(
    starts: Sequence[Widths],
    dense: Widths,
    scale: float,
    size_of: Callable[[Widths], int],
    limits: Limits,
    sizes: dict[Widths, int],
) -> Widths | None:
    """Move single widths by one, from the nearest sizes on, until a size is within limits."""

    def distance(widths: Widths) -> float:
        """From the uniform scaling: mean square of the relative differences."""
        pairs = zip(widths, dense, strict=True)
        return sum((w / max(1.0, scale * d) - 1) ** 2 for w, d in pairs) / len(dense)

    def urgency(widths: Widths) -> tuple[float, Widths]:
        return abs(size_of(widths) - limits.target) / limits.target + distance(widths), widths

    queue: list[tuple[float, Widths]] = []
    for widths in starts:
        heappush(queue, urgency(widths))
    seen = set(starts)
    while queue and len(sizes) < _MAX_SIZES:
        _, widths = heappop(queue)
        steps = [step for step in _steps(widths, dense) if step not in seen]
        fitting = [step for step in steps if size_of(step) in limits]
        if fitting:
            return min(fitting, key=distance)
        seen.update(steps)
        for step in steps:
            heappush(queue, urgency(step))
    return None


def _steps(widths: Widths, dense: Widths) -> Iterator[Widths]:
    for index, (width, most) in enumerate(zip(widths, dense, strict=True)):
        for other in (width - 1, width + 1):
            if 1 <= other <= most:
                yield (*widths[:index], other, *widths[index + 1 :])
