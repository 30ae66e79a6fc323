#!/usr/bin/env python
"""Compare runs: the metric over stored bytes, who wins where, and what it cost.

python scripts/report.py multirun/DATE/TIME --out report
python scripts/report.py outputs multirun --out report --title "All of it"
python scripts/report.py results/fashion_mnist/runs.jsonl --out results/fashion_mnist
python scripts/report.py outputs --out report --join-backbones

Writes `index.html`, `plots/` (PNG and PDF), `table.md`, `table.csv` and `runs.jsonl`, from which
the same report can be drawn again. docs/reporting.md says what is shown, and how it is computed.
"""

import sys

from memfold.reporting.report_command import main

if __name__ == "__main__":
    sys.exit(main())
