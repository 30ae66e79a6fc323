"""Which way to multiply costs least."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from memfold.strategies.sharing.fold import Block, add_block, read_block
from memfold.strategies.sharing.products.correlation import BlockTransform
from memfold.strategies.sharing.products.layout import RowLayout
from memfold.strategies.sharing.products.windows import takes_views

__all__ = ["SHIPPED_COSTS", "Choice", "Costs", "choose", "estimate", "measure"]

Choice = Literal["auto", "weight", "windows", "correlation"]
"""How the products with a weight are taken; "weight" builds it, "auto" leaves it to `choose`."""


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
    scatter: float
    """One number of a built weight's gradient, to be added to the slots."""
    copy: float
    """One number of a window, copied inside the caches."""
    add: float
    """One number, added to its window inside the caches."""
    run: float
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


SHIPPED_COSTS: Mapping[str, Costs] = {}
"""By device type. Measured once, so that every rank, run and resumption chooses alike."""


def choose(
    layout: RowLayout,
    batch: int,
    *,
    training: bool,
    device_type: str,
    costs: Costs | None = None,
) -> Choice:
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
    if costs is None:
        return "weight"
    estimates = estimate(layout, batch, training=training, costs=costs)
    return min(estimates, key=lambda choice: estimates[choice])


def estimate(layout: RowLayout, batch: int, *, training: bool, costs: Costs) -> dict[Choice, float]:
    """Estimate the seconds of each way to multiply.

    Args:
        layout: Of the weight.
        batch: Rows of the input.
        training: Whether to count the backward pass.
        costs: Of the device.
    """
    found: dict[Choice, float] = {
        "weight": _weight(layout, batch, training, costs),
        "windows": _windows(layout, batch, training, costs),
    }
    if len(layout.whole):
        found["correlation"] = _correlation(layout, batch, training, costs)
    return found


def _product(numel: int, batch: int, training: bool, read: float, c: Costs) -> float:
    """Multiply with a matrix: once, or three times in a training step."""
    return (3 if training else 1) * numel * (read + batch * c.multiply_add)


def _weight(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    numel = layout.num_rows * layout.columns
    moved = 2 * c.build + c.scatter if training else c.build
    calls = (8 if training else 2) * c.call + len(layout.blocks) * 4 * c.call
    return calls + numel * moved + _product(numel, batch, training, c.read, c)


def _windows(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    if takes_views(layout):
        times = 3 if training else 1
        straddling = _straddling(layout, batch, training, c)
        numel = (layout.num_rows - len(layout.straddling)) * layout.columns
        calls = times * (2 + len(layout.whole)) * c.call
        return calls + straddling + _product(numel, batch, training, c.read_cached, c)
    numel = layout.num_rows * layout.columns
    moved = numel * (2 * c.copy + c.add if training else c.copy)
    if training:
        moved += len(layout.runs) * c.run
    return 10 * c.call + moved + _product(numel, batch, training, c.read_cached, c)


def _straddling(layout: RowLayout, batch: int, training: bool, c: Costs) -> float:
    rows = len(layout.straddling)
    if not rows:
        return 0.0
    numel = rows * layout.columns
    moved = numel * (6 * c.copy + c.add if training else 3 * c.copy)
    if training:
        moved += 2 * rows * c.run
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
        places, plans, calls = 3 * places, 4 + 4 * steps, 80 + 10 * steps
    return (
        transforms * transform.work * c.transform
        + plans * c.plan
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
    large, cached, x, batch = make(4096, 4096), make(512, 512), make(512), make(256, 1024)
    block, square = make(1024, 1024), make(16, 16)
    multiplied = make.seconds(lambda: batch @ block.T) / batch.numel() / len(block)
    spectrum = torch.fft.rfft(make(16, 8192))
    transform = BlockTransform(8192, 4096, 1)
    samples, one = make(16, 8192), make(1, 8192)
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
    targets = [table[start : start + length] for start in starts[:16].tolist()]
    parts = list(flat.split(length))
    shortest = [target[:1] for target in targets]
    ones = [part[:1] for part in parts]
    windows = table.unfold(0, length, 1)
    run = make.seconds(lambda: torch._foreach_add_(shortest, ones)) / 16
    return {
        "build": make.seconds(lambda: read_block(slots, whole, 1.0, out)) / large.numel(),
        "scatter": make.seconds(lambda: add_block(large, whole, 1.0, slots)) / large.numel(),
        "copy": make.seconds(lambda: torch.index_select(windows, 0, few, out=copied))
        / copied.numel(),
        "add": make.seconds(lambda: torch._foreach_add_(targets, parts)) / flat.numel(),
        "run": run,
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
