#!/usr/bin/env python
"""Save the comparison of all runs of a W&B project as a workspace, or in a file without a key.

python scripts/wandb_dashboard.py --entity me --project memfold --group first_sweep

docs/wandb.md says how. Needs the extra `wandb`.
"""

import sys

from memfold.reporting.wandb_dashboard import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
