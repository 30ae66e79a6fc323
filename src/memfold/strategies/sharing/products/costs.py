"""Which way to multiply costs least, in what pieces: every constant and rule of the products."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from memfold.strategies.sharing.fold import LONG_WINDOW
from memfold.strategies.sharing.products.layout import RowLayout

__all__ = [
    "PLANNED_LENGTH",
    "SCRATCH_NUMEL",
    "SHIPPED_COSTS",
    "TRANSFORMED_NUMEL",
    "BlockTransform",
    "Choice",
    "Costs",
    "Way",
    "choose",
    "estimate",
    "takes_views",
]

Way = Literal["weight", "windows", "correlation"]
Choice = Literal["auto", "weight", "windows", "correlation"]
"""How the products with a weight are taken; "weight" builds it, "auto" leaves it to `choose`."""

SCRATCH_NUMEL = 1 << 18
"""About so many numbers are copied or built at a time: what caches hold."""
TRANSFORMED_NUMEL = 1 << 19
"""About so many are transformed at a time: enough that calls cost little beside transforms."""
# From so many rows in a window on, views are faster than copies.
_VIEW_ROWS = 64
# Longest transform that is chosen where shorter ones are possible.
_LONGEST = 1 << 15
# A transform of this length takes twice what its operations would.
_SLOW_LENGTH = 1 << 16
# Weights in smaller matrices are built, whatever it costs: microseconds.
_SMALLEST = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that parts of the products take on one kind of device, in float32."""

    multiply_add: float
    """One multiply-add of a large matrix product."""
    read: float
    """One number of a matrix in main memory, where it is multiplied with one vector."""
    read_cached: float
    """The same for a matrix in a cache."""
    build: float
    """One number of a built weight."""
    fresh: float
    """One number of a large new tensor, for which the system supplies memory every time."""
    scatter: float
    """One number of a built weight's gradient, to be added to the slots."""
    copy: float
    """One number of a window, copied inside the caches."""
    add: float
    """One number, added to its window inside the caches."""
    window: float
    """Each window that is added, whatever its length."""
    call: float
    """Each call of an operation on small tensors."""
    transform: float
    """One number of a Fourier transform, for each factor 2 of its length."""
    plan: float
    """Each call that transforms."""
    frequency: float
    """One complex multiplication in a spectrum."""
    place: float
    """One number that is read from or written to the start of a row."""


# Tensors of so many bytes are given back to the system when they go (glibc: at most this).
_FRESH_BYTES = 1 << 25
# Weights of so many bytes are still in a cache when they are multiplied with.
_CACHED_BYTES = 1 << 23
# A product of few rows takes as long as one with so many more, on either side.
_EXTRA_BATCH = 10
_EXTRA_ROWS = 16
# Calls that windows take whatever the layout.
_VIEW_CALLS = 25
_COPY_CALLS = 14
# Planning a transform takes time in proportion to its length; `Costs.plan` is for this one.
PLANNED_LENGTH = 8192

SHIPPED_COSTS: Mapping[str, Costs] = {
    # One core of a server, PyTorch 2.13 with MKL: scripts/measure_products.py.
    "cpu": Costs(
        multiply_add=2.2e-11,
        read=2.1e-10,
        read_cached=1.0e-10,
        build=3.6e-10,
        fresh=2.0e-9,
        scatter=2.4e-10,
        copy=1.15e-10,
        add=1.1e-10,
        window=3.7e-6,
        call=6.0e-6,
        transform=9.0e-11,
        plan=3.0e-5,
        frequency=3.8e-10,
        place=7.2e-10,
    ),
}
"""By device type. Measured once, so that every rank, run and resumption chooses alike."""


def takes_views(layout: RowLayout) -> bool:
    """Whether the windows hold so many rows that views of them are multiplied, not copies."""
    num_whole = layout.num_rows - len(layout.straddling)
    return 0 < len(layout.whole) * _VIEW_ROWS <= num_whole


@dataclass(frozen=True)
class BlockTransform:
    """How a correlation cuts the vector."""

    length: int
    hop: int
    count: int

    @classmethod
    def of(cls, columns: int, num_slots: int) -> "BlockTransform":
        """Choose the cheapest.

        Args:
            columns: Slots in a window.
            num_slots: The m of the circular vector.
        """
        candidates = []
        length = smallest = 1 << columns.bit_length()
        while length <= max(_LONGEST, 2 * smallest):
            for candidate in (length, length // 2 * 3):
                hop = candidate - columns
                if hop > candidate // 8:
                    # Layers with nearly as many columns share their spectra.
                    hop -= hop % max(1, candidate // 8)
                candidates.append(cls(candidate, hop, -(-num_slots // hop)))
            length *= 2
        return min(candidates, key=cls._step_work)

    @property
    def work(self) -> float:
        """What one transform costs, in numbers times log2(length).

        Long transforms leave the caches; those that are no power of two run a little slower.
        """
        slowdown = 1 + self.length / _SLOW_LENGTH
        if self.length & (self.length - 1):
            slowdown *= 1.12
        return self.length * math.log2(self.length) * slowdown

    @property
    def samples(self) -> int:
        """Samples that are worked on at a time."""
        return max(1, TRANSFORMED_NUMEL // (self.length * self.count))

    def _step_work(self) -> float:
        """A training step takes two transforms of a block, and products; three of a sample."""
        return (2.5 * self.count + 3) * self.work


def choose(
    layout: RowLayout,
    batch: int,
    *,
    training: bool,
    device_type: str,
    lasts: bool = False,
    costs: Costs | None = None,
) -> Way:
    """Choose how to multiply with one layer's weight.

    The choice is a function of the arguments: a timing at run time would let the last bits of
    results differ between runs.

    Args:
        layout: Of the weight.
        batch: Rows of the input.
        training: Whether a backward pass follows.
        device_type: As in `torch.device.type`. Where nothing was measured, the weight is built.
        lasts: Whether a weight that is built serves many batches, so that its building is free.
        costs: Instead of the shipped ones.
    """
    costs = SHIPPED_COSTS.get(device_type) if costs is None else costs
    if costs is None or layout.num_rows * layout.columns < _SMALLEST:
        return "weight"
    estimates = estimate(layout, batch, training=training, lasts=lasts, costs=costs)
    return min(estimates, key=lambda choice: estimates[choice])


def estimate(
    layout: RowLayout, batch: int, *, training: bool, lasts: bool = False, costs: Costs
) -> dict[Way, float]:
    """Estimate the seconds of each way to multiply.

    Args:
        layout: Of the weight.
        batch: Rows of the input.
        training: Whether to count the backward pass.
        lasts: Whether not to count the building of the weight.
        costs: Of the device.
    """
    found: dict[Way, float] = {
        "weight": _weight(layout, batch, training, lasts, costs),
        "windows": _windows(layout, batch, training, lasts, costs),
    }
    if len(layout.whole):
        found["correlation"] = _correlation(layout, batch, training, lasts, costs)
    return found


def _product(numel: int, batch: int, training: bool, read: float, c: Costs) -> float:
    """Multiply with a matrix: once, or three times in a training step."""
    rows = batch + _EXTRA_BATCH if batch > 1 else batch
    return (3 if training else 1) * numel * (read + rows * c.multiply_add)


def _weight(layout: RowLayout, batch: int, training: bool, lasts: bool, c: Costs) -> float:
    numel = layout.num_rows * layout.columns
    if lasts and not training:
        return _product(numel, batch, training, c.read, c)
    build, scatter, read = c.build, c.scatter, c.read
    if 4 * numel <= _CACHED_BYTES:
        build, scatter, read = c.copy, c.add, c.read_cached
    elif 4 * numel >= _FRESH_BYTES:
        build, scatter = build + c.fresh, scatter + c.fresh
    moved = numel * (2 * build + scatter if training else build)
    calls = (2 if training else 1) * (2 + 6 * len(layout.blocks))
    if training:
        calls += 6 * len(layout.blocks)
        moved += _added_runs(layout, 1, c)
    return calls * c.call + moved + _product(numel, batch, training, read, c)


def _windows(layout: RowLayout, batch: int, training: bool, lasts: bool, c: Costs) -> float:
    if takes_views(layout):
        groups, calls = len(layout.whole), _VIEW_CALLS * (2 if training else 1)
        num_whole = layout.num_rows - len(layout.straddling)
        # Matrices of few rows are multiplied less well.
        slowdown = 1 + _EXTRA_ROWS * groups / num_whole
        multiplied = _product(num_whole * layout.columns, batch, training, c.read_cached, c)
        calls += (3 if training else 1) * groups
        straddling = _straddling(layout, batch, training, lasts, c)
        return calls * c.call + straddling + multiplied * slowdown
    numel, calls = layout.num_rows * layout.columns, _COPY_CALLS * (2 if training else 1)
    moved = numel * (2 * c.copy + c.add if training else c.copy)
    if training:
        chunks = -(-numel // SCRATCH_NUMEL)
        moved += _added_runs(layout, chunks, c)
        calls += 12 * chunks
    prepared = 4 * min(layout.num_slots, numel) * c.build
    multiplied = _product(numel, batch, training, c.read_cached, c)
    return calls * c.call + prepared + moved + multiplied


def _added_runs(layout: RowLayout, chunks: int, c: Costs) -> float:
    """Add the windows one by one, or those of a short vector by way of 2 m^2 numbers."""
    m = layout.num_slots
    return len(layout.windows) * c.window if m >= LONG_WINDOW else chunks * 4 * m * m * c.add


def _straddling(layout: RowLayout, batch: int, training: bool, lasts: bool, c: Costs) -> float:
    rows = len(layout.straddling)
    if not rows:
        return 0.0
    numel = rows * layout.columns
    if lasts and not training:
        return 4 * c.call + _product(numel, batch, training, c.read, c)
    moved = numel * (6 * c.copy + c.add if training else 3 * c.copy)
    if training:
        moved += 2 * rows * c.window
    return 10 * c.call + moved + _product(numel, batch, training, c.read_cached, c)


def _correlation(layout: RowLayout, batch: int, training: bool, lasts: bool, c: Costs) -> float:
    transform = BlockTransform.of(layout.columns, layout.num_slots)
    blocks, numbers = transform.count, transform.length / 2
    transforms, calls = blocks * (batch + 1) + batch, 20
    frequencies, places = batch * blocks * numbers, batch * layout.num_rows
    steps = -(-batch // transform.samples)
    plans = 2 + 2 * steps
    if training:
        transforms += batch * (blocks + 2) + blocks
        frequencies += 5 * batch * blocks * numbers
        places, plans, calls = 3 * places, 4 + 4 * steps, 50 + 10 * steps
    return (
        2 * min(layout.num_slots, layout.num_rows * layout.columns) * c.build
        + transforms * transform.work * c.transform
        + plans * c.plan * transform.length / PLANNED_LENGTH
        + frequencies * c.frequency
        + places * c.place
        + (calls + 6 * steps) * c.call
        + _straddling(layout, batch, training, lasts, c)
    )
