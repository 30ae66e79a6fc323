#!/usr/bin/env python
"""The theory of parameter sharing against measurements: the figures and numbers of docs/theory.md.

python scripts/theory.py    # docs/theory/*.png, docs/theory/*.csv; two minutes of one core
"""

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

import memfold
from memfold.data.digits import Digits
from memfold.reporting.drawing import house_style
from memfold.strategies.sharing.gradient_scale import GradientScale, slot_factors
from memfold.strategies.sharing.hashednet import ElementMapping
from memfold.strategies.sharing.mapping import SlotMapping, Span
from memfold.strategies.sharing.random_fold import RandomFold
from memfold.strategies.sharing.roast import TileMapping

ROOT = Path(__file__).parents[1]
Row = dict[str, str | int | float]

FOLD, ELEMENT, TILE = "fold (stable_rps)", "element (hashednet)", "tile (roast)"
DRAWS = 400
DIVERGED = 10.0  # a training loss beyond it; the loss of a guess among ten classes is 2.3


def main() -> None:
    """Measure and draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "theory")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with house_style():
        for measure, draw in (
            (loads, draw_loads),
            (variances, draw_variances),
            (eigenvalues, draw_eigenvalues),
            (initial_scales, draw_initial_scales),
            (stable_rates, draw_stable_rates),
            (continuity, draw_continuity),
        ):
            rows = list(measure())
            name = measure.__name__
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            figure = Figure(figsize=(7.0, 3.4), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            draw(axes, rows)
            finish(axes)
            figure.savefig(folder / f"{name}.png", dpi=130)
            print(f"{name}: {len(rows)} rows", flush=True)


def finish(axes: Axes) -> None:
    """Add the legend beside the axes, and plain numbers."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def lines(axes: Axes, rows: list[Row], key: str, *names: str) -> None:
    """Draw one line for every value of `key`."""
    for number, value in enumerate(dict.fromkeys(row[key] for row in rows)):
        own = [row for row in rows if row[key] == value]
        axes.plot(*columns(own, *names), "os^Dv"[number] + "-:"[number % 2], label=str(value))


def mapping_of(kind: str, shape: Sequence[int], num_slots: int, seed: int) -> SlotMapping:
    """Map one tensor onto slots, with a sign of its own for every weight."""
    size = torch.Size(shape)
    spans = [Span("weight", size, 0, size.numel())]
    if kind == FOLD:
        return RandomFold(spans, num_slots, seed=seed, sign="weight")
    if kind == ELEMENT:
        return ElementMapping(spans, num_slots, seed=seed, sign="weight")
    return TileMapping(spans, num_slots, seed=seed, sign="weight", tile=(16, 16))


def matrix_of(mapping: SlotMapping) -> Tensor:
    """Return the signs (n, m) of every weight in its slot, float64."""
    identity = torch.eye(mapping.num_slots, dtype=torch.float64)
    columns = [[mapping.gather(row, span, 1.0) for span in mapping.spans] for row in identity]
    return torch.stack([torch.cat(parts) for parts in columns], dim=1)


# Loads: how many weights a slot serves


def loads() -> Iterator[Row]:
    """Measure the shares of unused slots, and the least and largest load, of 96 x 96 weights."""
    for kind, ratio in product((FOLD, ELEMENT, TILE), (1.0, 0.5, 0.3, 0.1)):
        mapping = mapping_of(kind, (96, 96), round(ratio * 96**2), seed=1)
        load = mapping.accumulate([1.0])
        yield {
            "mapping": kind,
            "ratio": ratio,
            "unused": float((load == 0).double().mean()),
            "unused_in_theory": 0.0 if kind == FOLD else math.exp(-1 / ratio),
            "least": int(load.min()),
            "largest": int(load.max()),
        }


def draw_loads(axes: Axes, rows: list[Row]) -> None:
    """Draw the unused slots."""
    lines(axes, rows, "mapping", "ratio", "unused")
    ratios = torch.linspace(0.1, 1, 50)
    axes.plot(ratios, (-1 / ratios).exp(), "k:", label="exp(-n / m)")
    axes.set(xlabel="ratio m / n", ylabel="share of slots that no weight uses")


# Inner products: what sharing and pruning keep of <w, x>


def variances() -> Iterator[Row]:
    """Measure the variance of the estimated inner product, over draws, and compute it."""
    generator = torch.Generator().manual_seed(0)
    n = 240
    for spectrum in ("even", "decaying"):
        size = torch.ones(n) if spectrum == "even" else torch.arange(1, n + 1) ** -0.75
        w, x = (torch.randn(2, n, generator=generator) * size).double()
        a, exact = w * x, float(w @ x)
        for ratio in (0.5, 0.25, 0.1, 0.05):
            m = round(ratio * n)
            theory = {
                "random pruning": n / m * (n - m) / (n - 1) * (a.square().sum() - a.sum() ** 2 / n),
                ELEMENT: collisions(w, x, torch.zeros(n, n, dtype=torch.bool), m),
                FOLD: collisions(w, x, same_partition(n, m), m),
            }
            for way, expected in theory.items():
                if way == "random pruning":
                    found = [pruned(a, m, generator) for _ in range(DRAWS)]
                else:
                    found = [shared(way, w, x, m, seed) for seed in range(DRAWS)]
                errors = torch.tensor(found, dtype=torch.float64) - exact
                yield {
                    "spectrum": spectrum,
                    "way": way,
                    "ratio": ratio,
                    "variance": float(errors.square().mean()),
                    "theory": float(expected),
                }


def collisions(w: Tensor, x: Tensor, never: Tensor, m: int) -> Tensor:
    """Sum over pairs of weights that meet with probability 1 / m, unless they never do."""
    a = w * x
    pairs = torch.outer(w.square(), x.square()) + torch.outer(a, a)
    apart = ~(never | torch.eye(len(w), dtype=torch.bool))
    return pairs[apart].sum() / m


def same_partition(n: int, m: int) -> Tensor:
    """Tell which pairs of weights lie in one partition of the fold, and never meet."""
    partition = torch.arange(n) // m
    return partition[:, None] == partition


def shared(kind: str, w: Tensor, x: Tensor, m: int, seed: int) -> float:
    """Return the inner product of what sharing keeps of `w` with `x`."""
    mapping = mapping_of(kind, (len(w),), m, seed)
    (span,) = mapping.spans
    slots = torch.zeros(m, dtype=torch.float64)
    mapping.scatter(w, span, 1.0, slots)
    return float(mapping.gather(slots, span, 1.0) @ x)


def pruned(a: Tensor, m: int, generator: torch.Generator) -> float:
    """Return the sum of m products out of n, scaled up."""
    kept = torch.randperm(len(a), generator=generator)[:m]
    return float(a[kept].sum() * len(a) / m)


def draw_variances(axes: Axes, rows: list[Row]) -> None:
    """Draw measurements as points and theory as lines."""
    for number, (spectrum, way) in enumerate(
        dict.fromkeys((r["spectrum"], r["way"]) for r in rows)
    ):
        own = [row for row in rows if (row["spectrum"], row["way"]) == (spectrum, way)]
        color, style = f"C{number % 3}", "-" if spectrum == "even" else "--"
        axes.plot(*columns(own, "ratio", "theory"), style, color=color, label=f"{way}, {spectrum}")
        axes.plot(*columns(own, "ratio", "variance"), "o", color=color)
    axes.set(xscale="log", yscale="log", xlabel="ratio m / n", ylabel="variance (points: draws)")


# Stability on a quadratic


def eigenvalues() -> Iterator[Row]:
    """Compute the largest rate of stable gradient descent, over that of the dense model.

    The loss is t'Ht / 2 of two layers with unlike scales lambda, 16 x 16 weights each.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 512, generator=generator, dtype=torch.float64)).Q
    hessian = basis * torch.logspace(0, -3, 512, dtype=torch.float64) @ basis.T
    scales = [0.05, 0.2]
    weight_scales = torch.tensor(scales, dtype=torch.float64).repeat_interleave(256)
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    ways: list[tuple[GradientScale, float | None]] = [
        ("projection", None),
        ("projection", 0.01),
        ("length", None),
        ("none", 0.04),
        ("none", 0.4),
    ]
    spans = [
        Span(name, torch.Size([16, 16]), start, start + 256)
        for name, start in (("first", 0), ("second", 256))
    ]
    for ratio, (way, initial_scale) in product((1.0, 0.5, 0.25, 0.1, 0.05, 0.02), ways):
        m = round(ratio * 512)
        mapping = RandomFold(spans, m, seed=1, sign="weight")
        signs = matrix_of(mapping)
        read = weight_scales[:, None] * signs
        forward, backward = slot_factors(mapping, scales, initial_scale, way, torch.float64)
        # phi moves by -rate * backward * read' H read forward phi: similar to a symmetric matrix.
        half = mapping.scale(torch.ones(m).double(), (forward * backward).sqrt())
        inner = half[:, None] * (read.T @ hessian @ read) * half
        largest = float(torch.linalg.eigvalsh(inner)[-1])
        name = way if initial_scale is None else f"{way}, initial scale {initial_scale:g}"
        yield {"gradient_scale": name, "ratio": ratio, "stable_rate_over_dense": top / largest}


def draw_eigenvalues(axes: Axes, rows: list[Row]) -> None:
    """Draw the largest stable rates."""
    lines(axes, rows, "gradient_scale", "ratio", "stable_rate_over_dense")
    axes.axhline(1, color="k", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="ratio m / n")
    axes.set_ylabel("largest stable rate / the dense model's")


# Trainings: a perceptron of 64-64-64-10 on the embedded digits


def digits() -> tuple[Tensor, Tensor]:
    """Return the training images (1437, 64), float64, and their classes."""
    data = Digits()
    split = data.load_train()
    images = (split.images.double().flatten(1) / 255 - data.mean[0]) / data.std[0]
    return images, split.labels


def train(
    x: Tensor, y: Tensor, *, rate: float, steps: int, seed: int, strategy: str = "dense", **how: Any
) -> list[float]:
    """Train by SGD with momentum 0.9 and batches of 64; return the loss of every step.

    It ends where the loss is beyond `DIVERGED`.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).double()
    if strategy != "dense":
        memfold.compress(model, strategy, seed=seed, **how)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model(x[batch]), y[batch])
        losses.append(loss.item())
        if not losses[-1] < DIVERGED:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def end_of(losses: Sequence[float]) -> float:
    """Return the mean loss of the last 20 steps, at most `DIVERGED`."""
    last = losses[-20:]
    return min(DIVERGED, sum(last) / len(last)) if losses[-1] < DIVERGED else DIVERGED


PUBLISHED_ROAST = {"strategy": "roast", "gradient_scale": "none", "tile_rows": 8, "tile_columns": 8}


def initial_scales() -> Iterator[Row]:
    """Train 200 steps at ratio 0.1 for every initial scale of the shared vector."""
    x, y = digits()
    ways: dict[str, dict[str, Any]] = {
        "stable_rps, projection": {"strategy": "stable_rps", "gradient_scale": "projection"},
        "stable_rps, length": {"strategy": "stable_rps"},
        "published ROAST": PUBLISHED_ROAST,
    }
    for (name, how), scale in product(ways.items(), (0.004, 0.013, 0.04, 0.13, 0.4, 1.3, 4.0)):
        ends = [
            end_of(train(x, y, rate=0.03, steps=200, seed=s, ratio=0.1, initial_scale=scale, **how))
            for s in (1, 2, 3)
        ]
        yield {"way": name, "initial_scale": scale, "loss": sum(ends) / 3}


def draw_initial_scales(axes: Axes, rows: list[Row]) -> None:
    """Draw the loss after training."""
    lines(axes, rows, "way", "initial_scale", "loss")
    axes.set(xscale="log", yscale="log", xlabel="initial scale of the vector")
    axes.set_ylabel("training loss (10: diverged)")


def stable_rates() -> Iterator[Row]:
    """Find the largest rate, in steps of sqrt 2, at which 200 steps halve the loss."""
    x, y = digits()
    rates = [2 ** (k / 2) / 100 for k in range(22)]
    ways: dict[str, dict[str, Any]] = {
        "projection": {"strategy": "stable_rps", "gradient_scale": "projection"},
        "length": {"strategy": "stable_rps", "gradient_scale": "length"},
        "none, initial scale 0.4": {
            "strategy": "stable_rps",
            "gradient_scale": "none",
            "initial_scale": 0.4,
        },
    }

    def largest(**how: Any) -> float:
        trained = [r for r in rates if end_of(train(x, y, rate=r, steps=200, seed=1, **how)) < 1.15]
        return max(trained, default=0.0)

    dense = largest()
    for (name, how), ratio in product(ways.items(), (1.0, 0.3, 0.1, 0.03)):
        rate = largest(ratio=ratio, **how)
        yield {"gradient_scale": name, "ratio": ratio, "rate": rate, "dense_rate": dense}


def draw_stable_rates(axes: Axes, rows: list[Row]) -> None:
    """Draw the rates."""
    lines(axes, rows, "gradient_scale", "ratio", "rate")
    axes.axhline(float(rows[0]["dense_rate"]), color="k", linestyle=":", label="dense")
    axes.set(xscale="log", yscale="log", xlabel="ratio m / n", ylabel="largest rate that trains")


def continuity() -> Iterator[Row]:
    """Train 200 steps at ratios up to 1: the distance of the losses to the dense model's."""
    x, y = digits()
    ways: dict[str, dict[str, Any]] = {
        "stable_rps": {"strategy": "stable_rps", "gradient_scale": "projection"},
        "hashednet": {"strategy": "hashednet", "gradient_scale": "projection"},
        "roast": {**PUBLISHED_ROAST, "gradient_scale": "projection"},
    }
    for (name, how), ratio in product(ways.items(), (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)):
        ends, farthest = [], 0.0
        for seed in (1, 2, 3):
            dense = train(x, y, rate=0.03, steps=200, seed=seed)
            losses = train(x, y, rate=0.03, steps=200, seed=seed, ratio=ratio, **how)
            ends.append(end_of(losses) / end_of(dense))
            gaps = [abs(a - b) for a, b in zip(losses, dense, strict=False)]
            farthest = max(farthest, *gaps)
        yield {"way": name, "ratio": ratio, "loss_over_dense": sum(ends) / 3, "farthest": farthest}


def draw_continuity(axes: Axes, rows: list[Row]) -> None:
    """Draw the loss after training over the dense model's."""
    lines(axes, rows, "way", "ratio", "loss_over_dense")
    axes.axhline(1, color="k", linestyle=":", label="dense")
    axes.set(yscale="log", xlabel="ratio m / n", ylabel="training loss / dense")


def columns(rows: list[Row], *names: str) -> list[list[float]]:
    """Return the columns of a table, as numbers."""
    return [[float(row[name]) for row in rows] for name in names]


if __name__ == "__main__":
    main()
