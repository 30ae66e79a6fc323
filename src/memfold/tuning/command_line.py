"""The command line of `scripts/tune.py`."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from memfold.errors import InputError
from memfold.studies.arguments import positive_integer
from memfold.tuning.configuration import Configuration
from memfold.tuning.space import read_space

__all__ = ["main"]

_CONFIG = "train"

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
    own, common = _split(arguments)
    options = _parser().parse_args(own)
    try:
        if importlib.util.find_spec("optuna") is None:
            raise InputError(
                "tuning needs the extra tune: pip install -c constraints.txt -e '.[tune]'"
            )
        from memfold.tuning.session import Session

        space = read_space(options.space)
        session = Session(
            space=space,
            configuration=Configuration(conf.resolve(), _CONFIG, common, space),
            program=program,
            conf=conf,
            folder=options.study,
            num_trials=options.trials,
            num_workers=options.workers,
            experiment=options.write_experiment,
            command=shlex.join(["python", "scripts/tune.py", *arguments]),
        )
        return session.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the command line at `--`."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s SPACE --study FOLDER --trials N [options] -- [overrides of train.py]",
        description="Search for good settings of train.py. Every trial is a normal run.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
