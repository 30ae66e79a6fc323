#!/usr/bin/env python
"""Time and memory of training and inference, relative to the dense model.

python scripts/benchmark.py --preset quick
python scripts/benchmark.py --models mlp50m,gpt --strategies stable_rps,low_rank --ratios 0.1,0.01
python scripts/benchmark.py --plot outputs/benchmark/TIME/results.json

Each case runs in a process of its own, in interleaved rounds. `results.json` and `table.md` are
written to `outputs/benchmark/TIME`.
"""

import sys

from memfold.benchmarking.benchmark_command import main

if __name__ == "__main__":
    sys.exit(main())
