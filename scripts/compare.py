#!/usr/bin/env python
"""Compare methods by a plan: each chooses on validation, then runs with all seeds; resumable.

python scripts/compare.py comparisons/fashion_mnist/5kB.yaml --out outputs/fashion_mnist

docs/comparison.md says how.
"""

import os
import sys
from pathlib import Path

from memfold.studies.choose import main

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    # A relative path, because every run records its command.
    program = Path(os.path.relpath(ROOT / "train.py"))
    sys.exit(main(sys.argv[1:], program=program, conf=ROOT / "conf"))
