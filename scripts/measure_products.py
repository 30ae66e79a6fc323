"""Measure what the parts of the products with a shared matrix cost on a device, in a second.

    OMP_NUM_THREADS=1 python scripts/measure_products.py [cpu | cuda]

The numbers go to `SHIPPED_COSTS` of `memfold.strategies.sharing.products.costs`.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from memfold.strategies.sharing.fold import Block, add_block, add_parts, read_block
from memfold.strategies.sharing.products.costs import PLANNED_LENGTH, BlockTransform, Costs


def measure(device: str = "cpu") -> Costs:
    """Measure what the parts of the products cost on a device, in about a second.

    Args:
        device: Where.
    """
    make = _Numbers(torch.device(device))
    large, cached, x, batch = make(4096, 4096), make(512, 512), make(512), make(128, 2048)
    block, square = make(2048, 2048), make(16, 16)
    multiplied = make.seconds(lambda: batch @ block.T) / batch.numel() / len(block)
    spectrum = torch.fft.rfft(make(16, PLANNED_LENGTH))
    transform = BlockTransform(PLANNED_LENGTH, 1, 1)
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


if __name__ == "__main__":
    print(measure(*sys.argv[1:2]))
