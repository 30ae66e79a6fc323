"""Run cases, each in a fresh process, in rounds that visit all cases of a group in turn.

Shared machines drift: a case and its dense one are measured right after each other, and compared
within the same round.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from memfold.benchmarking.cases import Case

__all__ = ["Measurement", "launch", "run_group"]

_TIMEOUT_SECONDS = 1800

Measurement = dict[str, Any]
"""What `memfold.benchmarking.case` printed: metrics and "steps", or an "error"."""


def run_group(
    cases: Sequence[Case],
    rounds: int,
    *,
    run: Callable[[Case], Measurement],
    report: Callable[[Case, int, Measurement], None],
) -> list[list[Measurement]]:
    """Measure the cases of one group, round by round.

    Args:
        cases: The dense one first.
        rounds: How often each is measured.
        run: Measures one case once.
        report: Told of every measurement, with the number of its round.

    Returns:
        For each case its measurements, one a round; none follows a failed one.
    """
    found: list[list[Measurement]] = [[] for _ in cases]
    for number in range(rounds):
        for case, measurements in zip(cases, found, strict=True):
            if measurements and "error" in measurements[-1]:
                continue
            measurements.append(run(case))
            report(case, number, measurements[-1])
    return found


def launch(case: Case) -> Measurement:
    """Measure one case in a new process; whatever goes wrong there ends up in "error"."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "memfold.benchmarking.case"],
            input=json.dumps(case.to_dict()),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {_TIMEOUT_SECONDS} seconds"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return {"error": f"killed by {name}{hint}"}
    lines = done.stdout.strip().splitlines() or [""]
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        errors = done.stderr.strip().splitlines() or ["no output"]
        return {"error": f"exit status {done.returncode}: {errors[-1]}"}
