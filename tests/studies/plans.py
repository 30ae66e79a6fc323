"""A small plan, and how to write it down."""

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
STAND_IN = REPOSITORY / "tests" / "studies" / "stand_in.py"

PLAN: dict[str, Any] = {
    "overrides": ["trainer.max_epochs=2", "logger=csv"],
    "methods": {
        "dense": ["compression=dense"],
        "synflow": ["compression=synflow"],
        "projection": ["compression=stable_rps", "compression.gradient_scale=projection"],
    },
    "choose": {
        "key": "optimizer.lr",
        "values": [0.01, 0.1, 1.0],
        "seed": 11,
        "at": {0.1: [0.3, 0.1], 0.01: [0.01]},
    },
    "seeds": [1, 2],
    "bits": [],
}


def write_plan(folder: Path, **changes: object) -> Path:
    """Write `PLAN` with other entries; `choose=` is merged, `None` removes one."""
    choose = PLAN["choose"] | changes.pop("choose", {})  # pyright: ignore
    content = {k: v for k, v in (PLAN | {"choose": choose} | changes).items() if v is not None}
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file
