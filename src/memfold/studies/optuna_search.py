"""`scripts/tune.py`: Optuna chooses settings on validation; the best is run with the test seeds."""

import argparse
import csv
import io
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from memfold.errors import InputError
from memfold.file_models import read_yaml
from memfold.files import read_text, write_text_atomically
from memfold.runs.folder import METRICS
from memfold.runs.locks import try_lock, wait_for_lock
from memfold.runs.primary import Primary
from memfold.studies.arguments import (
    command_parser,
    ending_in_one_line,
    positive_integer,
    split_overrides,
)
from memfold.studies.optuna_study import Study, Trial, database_errors
from memfold.studies.process import Stopped, StopSignal
from memfold.studies.runner import (
    Outcome,
    RunFailed,
    Runner,
    fit_seconds,
    metric_of,
    run_all,
    runners,
    share_work,
)
from memfold.studies.space import Space
from memfold.studies.tuned_configuration import Configuration, experiment_files, origin
from memfold.studies.tuning_report import describe, show_test, write_report

__all__ = ["main"]

_TEST_LOCK = ".test"
_SECONDS_BETWEEN_LOOKS = 0.5

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
    return ending_in_one_line(lambda stop: _tune(options, common, program, conf, command, stop))


def _tune(
    options: argparse.Namespace,
    common: Sequence[str],
    program: Path,
    conf: Path,
    command: str,
    stop: StopSignal,
) -> int:
    space = read_yaml(options.space, Space)
    configuration = Configuration(conf, common, space)
    folder: Path = options.study
    with stop.caught(), database_errors(folder):
        files = experiment_files(conf, folder, options.write_experiment)
        study = Study(folder.resolve(), space, common)
        workers = runners(program, options.workers, stop)
        with suppress(Stopped):
            claimed = _claimed_trials(study, options.trials, stop)
            share_work(claimed, workers, partial(_run_claimed, study, configuration))
        best = study.best()
        with try_lock(study.folder / _TEST_LOCK) as is_free:
            if not is_free:
                print(f"another process runs the test seeds and writes {folder}/report.md")
                return 0 if stop.number is None else 128 + stop.number
            tests: dict[int, Outcome] = {}
            if best is not None and not stop.event.is_set():
                seeds = ", ".join(map(str, space.tuning_seeds))
                mean = f"{space.objective.metric} {best.value:.4f}, the mean of seeds {seeds}"
                for file, arguments in files.items():
                    again = f"python train.py {' '.join(arguments)} seed=1"
                    head = [origin(folder), f"{mean}; trial {best.number}", again]
                    write_text_atomically(file, configuration.experiment(best.setting, head))
                with suppress(Stopped):
                    tests = _run_tests(study, configuration, workers, best)
            commands = {"The study, to go on with it or to join it": command}
            if best is not None:
                with_file = shlex.join([*next(iter(files.values())), "seed=1"])
                without = shlex.join([*configuration.overrides(best.setting), "seed=1"])
                commands["A run with the best setting"] = f"python train.py {with_file}"
                commands["The same without the experiment file"] = f"python train.py {without}"
            content = describe(study, configuration, best, tests, commands)
            write_report(study, content)
    return _conclude(content, space.objective.judged, options, stop)


def _claimed_trials(
    study: Study, num_trials: int, stop: StopSignal
) -> Iterator[tuple[optuna.Trial, ExitStack]]:
    """Draw trials until the study has enough, each with its lock.

    Enough are `num_trials` that are completed or pruned, or as many that failed.
    """
    while not stop.event.is_set():
        trial, hold = None, ExitStack()
        with study.claimed():
            states = [trial.state for trial in study.trials()]
            num_done = states.count("completed") + states.count("pruned")
            if num_done >= num_trials or states.count("failed") >= num_trials:
                return
            if num_done + states.count("running") < num_trials:
                trial = study.next_trial()
                hold.enter_context(wait_for_lock(study.lock(trial.number)))
        if trial is not None:
            yield trial, hold
        else:
            stop.event.wait(_SECONDS_BETWEEN_LOOKS)  # a running one may fail


def _run_claimed(
    study: Study,
    configuration: Configuration,
    worker: Runner,
    claimed: tuple[optuna.Trial, ExitStack],
) -> None:
    trial, hold = claimed
    with hold:
        with suppress(Stopped):
            _run_trial(study, configuration, trial, worker)
        _print_trial(study.trials()[trial.number])


def _print_trial(trial: Trial) -> None:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in trial.setting.items()}
    setting = " ".join(f"{key}={value}" for key, value in shown.items())
    match trial.state:
        case "completed":
            outcome = f"{trial.value:.4f}"
        case "pruned":
            outcome = f"pruned after epoch {trial.num_epochs}"
        case "failed":
            outcome = f"failed: {trial.notes.reason}"
        case _:
            outcome = "interrupted, to be tried again"
    print(f"trial {trial.number}: {setting}: {outcome} ({trial.notes.seconds:.0f} s)", flush=True)


def _run_trial(
    study: Study, configuration: Configuration, trial: optuna.Trial, worker: Runner
) -> None:
    """Train with every tuning seed, and tell Optuna the mean of the metric, or why there is none.

    When runs shall stop, Optuna is told nothing: the trial will be gone on with.
    """
    start = time.monotonic()
    notes: dict[str, Any] = {}
    value = None
    try:
        notes["values"], notes["seconds"] = _run_seeds(study, configuration, trial, worker)
        value, state = statistics.fmean(notes["values"]), TrialState.COMPLETE
    except RunFailed as error:
        state = TrialState.FAIL
        notes["reason"] = str(error)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    with study.claimed():
        for name, note in ({"seconds": time.monotonic() - start} | notes).items():
            trial.set_user_attr(name, note)
        study.optuna.tell(trial, value, state)


def _run_seeds(
    study: Study, configuration: Configuration, trial: optuna.Trial, worker: Runner
) -> tuple[list[float], float]:
    """Return the metric of every tuning seed, and how long the runs trained."""
    overrides = configuration.overrides(trial.params)
    group = configuration.group(study.name)
    values, seconds = [], 0.0
    for index, seed in enumerate(study.space.tuning_seeds):
        folder = study.trial_folder(trial.number) / f"s{seed}"
        watch = _Watch(study, trial, folder) if index == 0 else lambda: None
        # No test data, so that nothing here can be chosen by them.
        given = [*overrides, f"seed={seed}", "trainer.limit_test_batches=0", *group]
        result = worker.run(given, folder, watch)
        values.append(_metric(result, study.space.objective.metric))
        seconds += fit_seconds(result)
    return values, seconds


class _Watch:
    """Reports each epoch of a run to Optuna, and stops the run when its pruner says so.

    Epochs are judged one by one in their order, however many end between two looks, so that the
    same runs are stopped on a slow and on a fast machine.
    """

    def __init__(self, study: Study, trial: optuna.Trial, folder: Path) -> None:
        self._trial = trial
        self._folder = folder
        self._metric = study.space.objective.judged.name
        self._num_reported = study.trials()[trial.number].num_epochs
        # The last one may not have been judged yet.
        self._num_judged = max(0, self._num_reported - 1)

    def __call__(self) -> None:
        values = _read_metric(self._folder, self._metric)
        for epoch in range(self._num_judged, len(values)):
            if epoch >= self._num_reported:
                self._trial.report(values[epoch], epoch)
            self._num_judged = epoch + 1
            if self._trial.should_prune():
                raise optuna.TrialPruned


def _read_metric(folder: Path, name: str) -> list[float]:
    """Return a metric of each epoch, as far as the run in `folder` has written it.

    NaN stays NaN. Rounds follow one another.
    """
    try:
        text = read_text(folder / METRICS)
    except FileNotFoundError:
        return []
    whole_lines = text[: text.rfind("\n") + 1]  # the last one may be half written
    rows = csv.DictReader(io.StringIO(whole_lines))
    return [float(row[name]) for row in rows if row.get(name)]


def _metric(result: Mapping[str, Any], name: str) -> float:
    value = metric_of(result, name)
    if value is None:
        known = ", ".join(sorted(key for key in result.get("metrics") or () if "val/" in key))
        raise RunFailed(
            f"objective.metric: result.json has no {name}; validation metrics there: {known}"
        )
    return value


def _run_tests(
    study: Study, configuration: Configuration, workers: Sequence[Runner], best: Trial
) -> dict[int, Outcome]:
    """Run the best setting with every test seed that has not been run with it."""
    group = configuration.group(study.name, job_type=None)
    overrides = configuration.overrides(best.setting)
    seeds, metric = study.space.test_seeds, study.space.objective.judged.test
    runs = [(f"s{seed}", [*overrides, f"seed={seed}", *group]) for seed in seeds]

    def report(name: str, outcome: Outcome) -> None:
        value = metric_of(outcome.result, metric)
        shown = "-" if value is None else f"{value:.4f}"
        text = f"failed: {outcome.error}" if outcome.error else f"{metric} {shown}"
        print(f"test seed {name.removeprefix('s')}: {text}", flush=True)

    outcomes = run_all(runs, study.test_folder, workers, report)
    return {seed: outcomes[f"s{seed}"] for seed in seeds}


def _conclude(
    content: dict[str, Any], primary: Primary, options: argparse.Namespace, stop: StopSignal
) -> int:
    """Say how it ended, and return the exit status."""
    counts, best, test = content["num_trials"], content["best"], content["test"]
    num_done = counts["completed"] + counts["pruned"]
    summary = (
        f"{num_done} of {options.trials} trials done ({counts['completed']} completed, "
        f"{counts['pruned']} pruned), {counts['failed']} failed"
    )
    if stop.number is not None:
        print(f"interrupted: {summary}; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    if best is None:
        reasons = [trial["error"] for trial in content["trials"] if trial["error"]]
        raise InputError(f"--study {options.study}: all trials failed, the last: {reasons[-1]}")
    print(f"{summary}; best: trial {best['trial']}, {content['metric']} {best['value']:.4f}")
    print(f"report: {options.study / 'report.md'}")
    failed = [run for run in test["runs"] if run["error"]]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(test['runs'])} runs with test seeds failed, "
            f"the last: {failed[-1]['error']}; the same command tries them again"
        )
    summary = test[primary.test]
    if summary["mean"] is not None:
        seeds = ", ".join(map(str, content["test_seeds"]))
        print(f"{show_test(summary, primary)} (seeds {seeds})")
    return 0


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
