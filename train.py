"""Train one model inside a memory budget, or sweep over many with -m.

python train.py compression=stable_rps ratio=0.01
python train.py -m compression=stable_rps,roast ratio=0.1,0.01 seed=1,2,3
python train.py resume=outputs/2026-01-31/12-00-00-000000
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from memfold.train_command import launch, run_task


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one job; Hydra's sweepers get its validation accuracy."""
    return run_task(cfg, script=Path(__file__).resolve())


if __name__ == "__main__":
    sys.exit(launch(main))
