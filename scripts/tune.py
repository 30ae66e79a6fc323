#!/usr/bin/env python
"""Search for good settings of train.py: every trial a normal run, in a study that can be resumed.

python scripts/tune.py tuning/sgd.yaml --study studies/rps_digits --trials 20 -- \
    compression=stable_rps ratio=0.01 data=digits trainer.max_epochs=10

docs/tuning.md says how. Needs the extra `tune`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    if importlib.util.find_spec("optuna") is None:
        extra = "pip install -c constraints.txt -e '.[tune]'"
        sys.exit(f"error: tuning needs the extra tune: {extra}")
    from memfold.studies.optuna_search import main

    sys.exit(main(sys.argv[1:], program=ROOT / "train.py", conf=ROOT / "conf"))
