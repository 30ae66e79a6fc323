"""Measure layers that multiply with kept values alone against those that build the weight.

    OMP_NUM_THREADS=1 python scripts/measure_kept_products.py [SIDE,...] [DENSITY,...] [BATCH,...]

Prints, for square layers of float32 on the CPU, the milliseconds with the weight, of the processor
where there is one thread, and the ratio to that without it: of a training step, and of an
evaluation that has kept what it computed. The ways take turns, and what is shown are medians. `*`:
what `linear=auto` takes is dearer than the other way by more than a tenth. The constants of
`memfold.strategies.pruning.product_costs` are fitted to such tables.
"""

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.nn import functional as F

from memfold.strategies.pruning.product_costs import Product
from memfold.strategies.pruning.products import KeptProduct, RowBounds, multiply

_SECONDS = 1.0
_LEAST = 3


def main(sides: Sequence[int], densities: Sequence[float], batches: Sequence[int]) -> None:
    """Print the table."""
    print("| layer | density | batch | step, built | kept | evaluation, built | kept |")
    print("|---|---|---|---|---|---|---|")
    for side in sides:
        for density in densities:
            for batch in batches:
                print(f"| {side} x {side} | {density:g} | {batch} | {_row(side, density, batch)} |")


def _row(side: int, density: float, batch: int) -> str:
    torch.manual_seed(0)
    positions = torch.rand(side * side).lt(density).nonzero().squeeze(1)
    values = torch.randn(len(positions), requires_grad=True)
    x, gradient = torch.randn(batch, side, requires_grad=True), torch.randn(batch, side)
    layout = RowBounds.of(positions, side, side)

    def weight() -> torch.Tensor:
        return values.new_zeros(side * side).index_copy_(0, positions, values).view(side, side)

    def step(product: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(product(), (x, values), gradient)

    with torch.no_grad():
        dense = weight()
    size = side, side, len(positions), batch
    cells = []
    for ways, product in (
        (
            (
                lambda: step(lambda: F.linear(x, weight())),
                lambda: step(lambda: KeptProduct.apply(x, values, positions, side)),
            ),
            Product(*size, trains=True, lasts=False),
        ),
        (
            (lambda: F.linear(x, dense), lambda: multiply(x, values, layout)),
            Product(*size, trains=False, lasts=True),
        ),
    ):
        with torch.set_grad_enabled(product.trains):
            built, kept = _seconds(ways)
        ratio = median(k / b for k, b in zip(kept, built, strict=True))
        taken = ratio if product.is_cheaper_kept() else 1.0
        mark = "*" if taken > 1.1 * min(ratio, 1.0) else ""
        cells += [f"{1e3 * median(built):.3g}", f"{ratio:.2g}{mark}"]
    return " | ".join(cells)


def _seconds(ways: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Time calls of each way in turn."""
    for way in ways:
        way()
    found: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(found[0]) < _LEAST:
        for way, times in zip(ways, found, strict=True):
            begin = _clock()
            way()
            times.append(_clock() - begin)
    return found


def _clock() -> float:
    """Other jobs do not count where there is one thread; what several save shows in real time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


if __name__ == "__main__":
    given = [argument.split(",") for argument in sys.argv[1:]]
    defaults = ["1024,4096,8192", "0.1,0.03,0.01,0.003,0.001", "1,16,128,1024"]
    lists = [*given, *(text.split(",") for text in defaults[len(given) :])]
    main([int(n) for n in lists[0]], [float(n) for n in lists[1]], [int(n) for n in lists[2]])
