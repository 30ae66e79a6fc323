#!/usr/bin/env python
"""Signs per column, weight and run on four small networks: test accuracy on Fashion-MNIST.

Every network trains in a plain loop, without warm-up, at the learning rate of its dense form; the
linear model at the best of several for each sign and ratio, chosen on validation with another
seed. What docs/signs.csv has already is kept; the rest is added to it, one setting after another.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfold
from memfold.data.fashion_mnist import FashionMNIST

ROOT = Path(__file__).parents[1]
SIGNS = ("column", "weight", "run")
RATIOS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SEEDS = (1, 2, 3, 4, 5)
TRIED = (0.01, 0.03, 0.1, 0.3)
BATCH = 128
COLUMNS: tuple[str, ...] = (
    "network",
    "sign",
    "gradient_scale",
    "ratio",
    "rate",
    "seed",
    "test_acc",
)
# The dense network first.
WAYS: list[dict[str, Any]] = [
    {},
    *(
        {"sign": sign, "gradient_scale": scale, "ratio": ratio}
        for scale, signs in (("length", SIGNS), ("projection", SIGNS[:1]))
        for ratio in RATIOS
        for sign in signs
    ),
]
Split = tuple[Tensor, Tensor]


def linear() -> nn.Module:
    """Softmax regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def lenet() -> nn.Module:
    """LeNet-300-100."""
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def cnn() -> nn.Module:
    """Three strided convolutions with BatchNorm, 23,600 weights."""
    model = nn.Sequential()
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        model.extend((convolution, nn.BatchNorm2d(outputs), nn.ReLU()))
    return model.extend((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


class Transformer(nn.Module):
    """Two encoder layers on 16 patches of 7 x 7 pixels, 70,000 weights."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.embed = nn.Linear(49, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, 28, 28) to logits (B, 10)."""
        patches = F.unfold(images, 7, stride=7).transpose(1, 2)
        return self.head(self.layers(self.embed(patches) + self.positions).mean(1))


# The network, its optimizer, the learning rates to choose from, epochs.
NETWORKS: dict[str, tuple[Any, Any, tuple[float, ...], int]] = {
    "linear": (linear, torch.optim.SGD, TRIED, 2),
    "lenet": (lenet, torch.optim.SGD, (0.1,), 2),
    "cnn": (cnn, torch.optim.SGD, (0.1,), 2),
    "transformer": (Transformer, torch.optim.AdamW, (4e-3,), 2),
}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=ROOT / "data", help="folder of data sets")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "signs.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = load(arguments.root)
    rows = read(arguments.out)
    for network in arguments.networks:
        for way in WAYS:
            done = [row for row in rows if row["network"] == network and is_way(row, way)]
            if len(done) < len(SEEDS):
                rows += compare(network, way, splits)
                write(arguments.out, rows)
        show(network, rows)


def is_way(row: dict[str, Any], way: dict[str, Any]) -> bool:
    """Whether a row was trained in this way."""
    return all(row.get(key, "") == str(way.get(key, "")) for key in WAYS[1])


def load(root: Path) -> tuple[Split, Split, Split]:
    """Read 20,000 images to train on, 5,000 for validation, 10,000 to test, normalised."""
    data = FashionMNIST(root=str(root))
    data.prepare_data()
    whole, test = data.load_train(), data.load_test()
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    x, x_test = ((images / 255 - mean) / std for images in (whole.images, test.images))
    y, y_test = whole.labels, test.labels
    return (x[:20000], y[:20000]), (x[20000:25000], y[20000:25000]), (x_test, y_test)


def compare(
    network: str, way: dict[str, Any], splits: tuple[Split, Split, Split]
) -> list[dict[str, Any]]:
    """Train one network in one way with every seed."""
    *others, rate = tried = NETWORKS[network][2]
    if others:
        rate = max(tried, key=lambda rate: train(network, way, 11, rate, splits, 1))
    facts = {"network": network, **{key: str(value) for key, value in way.items()}, "rate": rate}
    return [
        {**facts, "seed": seed, "test_acc": f"{train(network, way, seed, rate, splits, 2):.2f}"}
        for seed in SEEDS
    ]


def train(
    network: str,
    way: dict[str, Any],
    seed: int,
    rate: float,
    splits: tuple[Split, Split, Split],
    tested: int,
) -> float:
    """Return the accuracy in percent on split number `tested` after the last step."""
    make, optimizer_class, _, epochs = NETWORKS[network]
    torch.manual_seed(seed)
    model = make()
    if way:
        memfold.compress(model, "stable_rps", seed=seed, **way)
    options: dict[str, Any] = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), rate, **options)
    (x, y), (x_test, y_test) = splits[0], splits[tested]
    steps = len(x) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: steps // epochs * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in x_test.split(1000)])
    return 100 * float((outputs.argmax(1) == y_test).float().mean())


def read(path: Path) -> list[dict[str, Any]]:
    """Read what was measured before."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one line for each training."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(network: str, rows: list[dict[str, Any]]) -> None:
    """Print a line for each way, mean and standard deviation over seeds at every ratio."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["network"] == network:
            name = (row.get("sign") or "dense", row.get("gradient_scale") or "")
            found[name][str(row.get("ratio") or "1")].append(float(row["test_acc"]))
    for (sign, scale), ratios in found.items():
        cells = [
            f"{statistics.mean(a):.1f} ± {statistics.stdev(a):.1f}" if len(a) > 1 else f"{a[0]:.1f}"
            for a in ratios.values()
        ]
        print(f"| {network} | {sign} {scale} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
