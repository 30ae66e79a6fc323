"""`scripts/tune.py`: Optuna chooses settings on validation; the best is run with the test seeds."""

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from memfold.errors import InputError
from memfold.studies.arguments import (
    command_parser,
    ending_in_one_line,
    positive_integer,
    split_overrides,
)
from memfold.studies.process import StopSignal

__all__ = ["main"]

_EXAMPLE = """example:
  python scripts/tune.py tuning/sgd.yaml --study studies/rps_digits --trials 20 -- \\
      compression=stable_rps ratio=0.01 data=digits trainer.max_epochs=10

The same command goes on with a study that was interrupted, and joins one that runs."""


def main(arguments: Sequence[str], program: Path, conf: Path) -> int:
    """Tune, test, report.

    Args:
        arguments: The command line after the program's name.
        program: `train.py`.
        conf: Its configuration folder.

    Returns:
        The exit status: 0, 1 after a user's mistake or when a study has no result (one line on
        stderr), 128 + the signal after Ctrl-C or SIGTERM.
    """
    own, common = split_overrides(arguments)
    options = _parser().parse_args(own)
    command = shlex.join(["python", "scripts/tune.py", *arguments])

    def body(stop: StopSignal) -> int:
        if importlib.util.find_spec("optuna") is None:
            raise InputError(
                "tuning needs the extra tune: pip install -c constraints.txt -e '.[tune]'"
            )
        from memfold.studies.optuna_runs import tune

        return tune(options, common, program, conf, command, stop)

    return ending_in_one_line(body)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Search for good settings of train.py. Every trial is a normal run.",
        _EXAMPLE,
        "%(prog)s SPACE --study FOLDER --trials N [options] -- [overrides of train.py]",
    )
    add = parser.add_argument
    add("space", type=Path, metavar="SPACE", help="the search space, such as tuning/sgd.yaml")
    add("--study", type=Path, required=True, metavar="FOLDER", help="where all of it is kept")
    add(
        "--trials",
        type=positive_integer,
        required=True,
        metavar="N",
        help="how many the study shall have, completed or pruned, of all workers together",
    )
    add(
        "--workers",
        type=positive_integer,
        default=1,
        metavar="N",
        help="trials at a time on this machine; cores and GPUs are divided (default 1)",
    )
    add(
        "--write-experiment",
        metavar="NAME",
        help="write the best setting to conf/experiment/NAME.yaml, too",
    )
    return parser
