"""Which way to multiply costs least."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from memfold.strategies.sharing.fold import LONG_WINDOW, Block, add_block, read_block
from memfold.strategies.sharing.products.adding import add_parts
from memfold.strategies.sharing.products.correlation import BlockTransform
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.windows import SCRATCH_NUMEL, takes_views

__all__ = ["SHIPPED_COSTS", "Choice", "Costs", "Way", "choose", "estimate", "measure"]

Way = Literal["weight", "windows", "correlation"]
Choice = Literal["auto", "weight", "windows", "correlation"]
"""How the products with a weight are taken; "weight" builds it, "auto" leaves it to `choose`."""


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
_PLANNED_LENGTH = 8192

SHIPPED_COSTS: Mapping[str, Costs] = {
    # One core of a server, PyTorch 2.13 with MKL.
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


def choose(
    layout: RowLayout,
    batch: int,
    *,
    training: bool,
    device_type: str,
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
        costs: Instead of the shipped ones.
    """
    costs = SHIPPED_COSTS.get(device_type) if costs is None else costs
    if costs is None or layout.num_rows * layout.columns < _SMALLEST:
        return "weight"
    estimates = estimate(layout, batch, training=training, costs=costs)
    return min(estimates, key=lambda choice: estimates[choice])


def estimate(layout: RowLayout, batch: int, *, training: bool, costs: Costs) -> dict[Way, float]:
    """Estimate the seconds of each way to multiply.

    Args:
        layout: Of the weight.
        batch: Rows of the input.
        training: Whether to count the backward pass.
        costs: Of the device.
    """
    found: dict[Way, float] = {
        "weight": _weight(layout, batch, training, costs),
        "windows": _windows(layout, batch, training, costs),
    }
    if len(layout.whole):
        found["correlation"] = _correlation(layout, batch, training, costs)
    return found


def _product(numel: int, batch: int, training: bool, read: float, c: Costs) -> float:
    """Multiply with a matrix: once, or three times in a training step."""
    rows = batch + _EXTRA_BATCH if batch > 1 else batch
    return (3 if training else 1) * numel * (read + rows * c.multiply_add)


def _weight(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    numel = layout.num_rows * layout.columns
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


def _windows(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    if takes_views(layout):
        groups, calls = len(layout.whole), _VIEW_CALLS * (2 if training else 1)
        num_whole = layout.num_rows - len(layout.straddling)
        # Matrices of few rows are multiplied less well.
        slowdown = 1 + _EXTRA_ROWS * groups / num_whole
        multiplied = _product(num_whole * layout.columns, batch, training, c.read_cached, c)
        calls += (3 if training else 1) * groups
        straddling = _straddling(layout, batch, training, c)
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


def _straddling(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    rows = len(layout.straddling)
    if not rows:
        return 0.0
    numel = rows * layout.columns
    moved = numel * (6 * c.copy + c.add if training else 3 * c.copy)
    if training:
        moved += 2 * rows * c.window
    return 10 * c.call + moved + _product(numel, batch, training, c.read_cached, c)


def _correlation(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
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
        + plans * c.plan * transform.length / _PLANNED_LENGTH
        + frequencies * c.frequency
        + places * c.place
        + (calls + 6 * steps) * c.call
        + _straddling(layout, batch, training, c)
    )


def measure(device: torch.device | str = "cpu") -> Costs:
    """Measure what the parts of the products cost on a device, in about a second.

    Args:
        device: Where.
    """
    make = _Numbers(torch.device(device))
    large, cached, x, batch = make(4096, 4096), make(512, 512), make(512), make(128, 2048)
    block, square = make(2048, 2048), make(16, 16)
    multiplied = make.seconds(lambda: batch @ block.T) / batch.numel() / len(block)
    spectrum = torch.fft.rfft(make(16, _PLANNED_LENGTH))
    transform = BlockTransform(_PLANNED_LENGTH, 1, 1)
    samples, one = make(16, transform.length), make(1, transform.length)
    transformed = make.seconds(lambda: torch.fft.rfft(samples)) / len(samples)
    places = torch.randperm(one.numel(), generator=make.generator)[:4096].to(device)
    return Costs(
        multiply_add=multiplied,
        read=make.seconds(lambda: large @ large[0]) / large.numel(),
        read_cached=make.seconds(lambda: cached @ x) / cached.numel(),
        **_measure_windows(make, large.view(-1)),
        call=make.seconds(lambda: square.addmm_(square[:8].T, square[:8], beta=0)),
        transform=transformed / transform.work,
        plan=max(0.0, make.seconds(lambda: torch.fft.rfft(one)) - transformed),
        frequency=make.seconds(lambda: torch.mul(spectrum, spectrum[:1])) / spectrum.numel(),
        place=make.seconds(lambda: torch.gather(samples, 1, places.expand(16, -1))) / 16 / 4096,
    )


def _measure_windows(make: "_Numbers", large: torch.Tensor) -> dict[str, float]:
    """Measure what does not multiply, with a vector of 2^16 slots."""
    length, slots = 1 << 14, make(1 << 16)
    count = large.numel() // length
    starts = torch.randint(len(slots), (count,), generator=make.generator).numpy()
    whole = Block(0, length, starts, np.ones_like(starts))
    out, flat = torch.empty_like(large), large[: 16 * length]
    few, table = torch.from_numpy(starts[:16]).to(large.device), slots.repeat(2)
    copied = torch.empty_like(flat).view(16, length)
    first = (starts[:16], np.ones(16), 1.0, table)
    windows = table.unfold(0, length, 1)
    window = make.seconds(lambda: add_parts(flat[:16], 1, *first)) / 16
    build = make.seconds(lambda: read_block(slots, whole, 1.0, out)) / large.numel()
    anew = make.seconds(lambda: read_block(slots, whole, 1.0, torch.empty_like(large)))
    scatter = make.seconds(lambda: add_block(large, whole, 1.0, slots)) / large.numel()
    copy = make.seconds(lambda: torch.index_select(windows, 0, few, out=copied)) / flat.numel()
    add = make.seconds(lambda: add_parts(flat, length, *first)) / flat.numel()
    return {
        "build": build,
        "fresh": max(0.0, anew / large.numel() - build),
        "scatter": max(0.0, scatter - window / length),
        "copy": copy,
        "add": max(0.0, add - window / length),
        "window": window,
    }


class _Numbers:
    """Makes random tensors, and takes the least time of several runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Time one call: the least of ten batches of calls."""
        run()
        times = []
        for _ in range(10):
            self._wait()
            begin = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - begin)
        return min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
