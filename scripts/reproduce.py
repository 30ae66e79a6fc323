#!/usr/bin/env python
"""The comparison of the STABLE-RPS paper: every experiment, method, ratio and seed, and a report.

python scripts/reproduce.py --out outputs/paper --dry-run
python scripts/reproduce.py --out outputs/paper --experiments cifar10_vgg11 --jobs-per-device 4

The same command goes on with what was interrupted or has failed; docs/reproduction.md has the rest.
"""

import sys
from pathlib import Path

from memfold.studies.reproduction import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], root=Path(__file__).resolve().parents[1]))
