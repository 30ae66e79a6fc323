"""What a run leaves that must not depend on whether it was interrupted."""

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Dropout, BatchNorm, momentum, augmentation: whatever is not restored shows in the weights.
SENSITIVE = (
    "logger=csv",
    "trainer=cpu",
    "~callbacks.progress_bar",
    "backbone=custom",
    "backbone.target=training.networks.DrawingNet",
    "data.batch_size=128",
    "data.crop_padding=1",
    "scheduler=one_cycle",
)
STRATEGIES = {
    "dense": ("compression=dense", "trainer.max_epochs=4"),
    "stable_rps": ("compression=stable_rps", "ratio=0.3", "trainer.max_epochs=4"),
    "rigl": (
        "compression=rigl",
        "ratio=0.3",
        "compression.update_every=7",
        "trainer.max_epochs=4",
    ),
    "ltr": (
        "compression=ltr",
        "ratio=0.3",
        "compression.fraction=0.5",
        "compression.rewind_steps=13",
        "trainer.max_epochs=3",
    ),
}


def state(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]


def epoch_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of training, validation and test; not those of memory."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"]]
    kept = [{k: v for k, v in row.items() if v and not k.startswith("memory/")} for row in rows]
    # A run that is resumed after its last epoch validates once more.
    steps = [row["step"] for row in kept if "train/loss" in row]
    return [row for row in kept if "val/acc" not in row or row["step"] in steps]


def differences(found: Path, expected: Path) -> list[str]:
    """Name what differs between two runs; the weights are compared bit for bit."""
    different: list[str] = []
    pairs: list[tuple[str, Any, Any]] = [
        (name, state(found, name), state(expected, name)) for name in ("last", "best")
    ]
    artifacts = [load_file(folder / "model.safetensors") for folder in (found, expected)]
    for name, tensors, others in [*pairs, ("artifact", *artifacts)]:
        if tensors.keys() != others.keys():
            different.append(f"{name}: names")
        different += [
            f"{name}: {key}"
            for key in tensors.keys() & others.keys()
            if not torch.equal(tensors[key], others[key])
        ]
    if epoch_rows(found) != epoch_rows(expected):
        different.append(f"metrics.csv: {epoch_rows(found)} is not {epoch_rows(expected)}")
    partial = [str(path) for path in found.rglob("*.partial")]
    return different + partial
