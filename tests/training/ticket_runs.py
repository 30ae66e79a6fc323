"""Small runs of several rounds, and what they leave."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memfold.strategies.pruning.stored_masks import masks_of
from memfold.training import run
from training.jobs import SMALL, compose_job

# Dropout, BatchNorm and momentum; 10 steps an epoch, 2368 weights.
NETWORK = ("backbone=custom", "backbone.target=training.networks.DropoutNet", "data.crop_padding=1")
TICKETS = (
    *(text for text in SMALL if text != "backbone=mlp"),
    *NETWORK,
    "data.batch_size=128",
    "scheduler=one_cycle",
    "compression=ltr",
    "trainer.max_epochs=3",
)
THREE_ROUNDS = (*TICKETS, "ratio=0.3", "compression.fraction=0.5", "compression.rewind_steps=13")
COUNTS = [2368, 1184, 710]
SHAPES = [torch.Size((32, 64)), torch.Size((10, 32))]
NAMES = ["net.1.weight_values", "net.5.weight_values"]

State = dict[str, Any]


def run_small(folder: Path, *overrides: str) -> State:
    return run(compose_job(folder, *overrides))


def load(path: Path) -> State:
    return torch.load(path, weights_only=True)


def round_folders(folder: Path) -> list[Path]:
    """Folders with what each round has left, the last round's being the run folder."""
    return [*sorted((folder / "rounds").glob("[0-9]")), folder]


def masks(checkpoint: State) -> list[Tensor]:
    state = checkpoint["state_dict"]
    return masks_of({key: state[f"net.{key}"] for key in ("kept_counts", "kept_index")}, SHAPES)


def metric_rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open(newline="") as file:
        names = ("step", "epoch", "round", "lr", "train/loss", "val/acc", "val/loss", "test/acc")
        rows = [row for row in csv.DictReader(file) if row["epoch"]]
    # A run that is resumed after its last epoch validates once more.
    again = [row for row in rows if row["epoch"] == "3" and not row["test/acc"]]
    return [tuple(row.get(n, "") for n in names) for row in rows if row not in again]
