"""The report of a study: `report.json`, and `report.md` for reading."""

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memfold.files import write_text_atomically
from memfold.runs.primary import Primary
from memfold.studies.optuna_study import Study, Trial
from memfold.studies.runner import Outcome, metric_of
from memfold.studies.tuned_configuration import Configuration

__all__ = ["describe", "show_test", "write_report"]

_STATES = ("completed", "pruned", "failed")


def describe(
    study: Study,
    configuration: Configuration,
    best: Trial | None,
    tests: Mapping[int, Outcome],
    commands: Mapping[str, str],
) -> dict[str, Any]:
    """Collect what the report says.

    Args:
        study: With its trials.
        configuration: Writes overrides.
        best: The trial that was chosen, if one is completed.
        tests: Its runs, by test seed; empty when they have not been run.
        commands: What to type, by what it does.
    """
    space, trials = study.space, study.trials()
    counts = Counter(trial.state for trial in trials)
    command = ["python", "train.py", *configuration.overrides(best.setting if best else {})]
    return {
        "study": study.folder.name,
        "commands": dict(commands),
        "overrides": list(configuration.common),
        **space.to_dict(),
        "num_trials": {state: counts[state] for state in _STATES},
        "best": None if best is None else _describe_best(study, best, command),
        "test": _describe_tests(study, tests, command) if tests else None,
        "trials": [
            {
                "trial": trial.number,
                "state": trial.state,
                "setting": trial.setting,
                "value": trial.value,
                "values": trial.notes.values,
                "epochs_judged": trial.num_epochs,
                "seconds": trial.notes.seconds,
                "error": trial.notes.reason if trial.state == "failed" else None,
            }
            for trial in trials
        ],
    }


def write_report(study: Study, content: Mapping[str, Any]) -> None:
    """Write both files into the study folder.

    Raises:
        InputError: A file cannot be written.
    """
    text = json.dumps(content, indent=2)
    write_text_atomically(study.folder / "report.json", text + "\n")
    page = _to_markdown(content, study.space.objective.judged)
    write_text_atomically(study.folder / "report.md", page)


def show_test(summary: Mapping[str, Any], primary: Primary) -> str:
    """Write what was measured on the test data over the test seeds."""
    spread = "" if summary["std"] is None else f" ± {primary.show(summary['std'])}"
    mean = primary.show(summary["mean"])
    return f"test {primary.title} {mean.removesuffix(' %') if spread else mean}{spread}"


def _to_markdown(content: Mapping[str, Any], primary: Primary) -> str:
    counts = content["num_trials"]
    tuning, test = (", ".join(map(str, content[f"{name}_seeds"])) for name in ("tuning", "test"))
    goal = "largest" if content["maximize"] else "smallest"
    overrides = " ".join(content["overrides"]) or "-"
    lines = [
        f"# {content['study']}",
        "",
        f"Chosen: the setting with the {goal} mean `{content['metric']}` over the **tuning seeds "
        f"{tuning}**, on validation data; no trial looked at the test data. Only the best setting "
        f"was run with the **test seeds {test}**.",
        "",
        f"{counts['completed']} trials completed, {counts['pruned']} pruned, {counts['failed']} "
        "failed.",
        "",
        *_best_lines(content, primary),
        "## Search space",
        "",
        f"Common to all trials: `{overrides}`. Sampler: TPE, seed {content['sampler_seed']}, "
        f"{content['startup_trials']} random trials first. "
        f"{_pruning(content['pruning'], primary)}",
        "",
        *_space_lines(content),
        "## Commands",
        "",
    ]
    for what, command in content["commands"].items():
        lines += [f"{what}:", "", "```bash", command, "```", ""]
    return "\n".join([*lines, *_trial_lines(content)]) + "\n"


def _describe_best(study: Study, best: Trial, command: Sequence[str]) -> dict[str, Any]:
    seeds = map(str, study.space.tuning_seeds)
    return {
        "trial": best.number,
        "setting": best.setting,
        "value": best.value,
        "values": dict(zip(seeds, best.notes.values, strict=True)),
        "command": shlex.join(command),
    }


def _describe_tests(
    study: Study, tests: Mapping[int, Outcome], command: Sequence[str]
) -> dict[str, Any]:
    metric = study.space.objective.judged.test
    runs = [
        {
            "seed": seed,
            "folder": str(study.test_folder / f"s{seed}"),
            "command": shlex.join([*command, f"seed={seed}"]),
            metric: metric_of(outcome.result, metric),
            "error": outcome.error or None,
        }
        for seed, outcome in tests.items()
    ]
    values = [run[metric] for run in runs if run[metric] is not None]
    return {
        metric: {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "num_runs": len(values),
        },
        "runs": runs,
    }


def _best_lines(content: Mapping[str, Any], primary: Primary) -> list[str]:
    best, test = content["best"], content["test"]
    if best is None:
        return ["No trial is completed.", ""]
    values = ", ".join(f"{value:.4f} (seed {seed})" for seed, value in best["values"].items())
    lines = [
        "## Best setting",
        "",
        f"Trial {best['trial']}, `{content['metric']}` {best['value']:.4f}: {values}.",
        "",
        *_table(("parameter", "value"), best["setting"].items()),
    ]
    if test is None:
        return [*lines, "It has not been run with the test seeds.", ""]
    summary = test[primary.test]
    if summary["mean"] is not None:
        shown, num_runs = show_test(summary, primary), summary["num_runs"]
        over = f"mean ± sample standard deviation over {num_runs} test seeds"
        if num_runs == 1:
            over = "of one test seed"
        lines += [f"**{shown[0].upper()}{shown[1:]}**, {over}.", ""]
    rows = [(run["seed"], run[primary.test], run["error"]) for run in test["runs"]]
    return [*lines, *_table(("test seed", primary.test, "error"), rows)]


def _space_lines(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, entry in content["parameters"].items():
        ((kind, options),) = entry.items()
        if kind == "choice":
            allowed = ", ".join(map(_cell, options["values"]))
        else:
            scale = ", log" if options["log"] else ""
            allowed = f"{kind} from {options['low']:g} to {options['high']:g}{scale}"
        rows.append((key, allowed))
    return _table(("parameter", "values"), rows)


def _trial_lines(content: Mapping[str, Any]) -> list[str]:
    keys = list(content["parameters"])
    rows = [
        (
            trial["trial"],
            trial["state"],
            *(trial["setting"].get(key, "") for key in keys),
            trial["value"],
            trial["epochs_judged"] if trial["state"] == "pruned" else None,
            f"{trial['seconds']:.0f}",
            trial["error"],
        )
        for trial in content["trials"]
    ]
    header = ("trial", "state", *keys, content["metric"], "stopped after epoch", "s", "error")
    return ["## All trials", "", *_table(header, rows)]


def _pruning(pruning: Mapping[str, int] | None, primary: Primary) -> str:
    if pruning is None:
        return "No pruning."
    return (
        f"A trial is pruned when its best `{primary.name}` so far, with the first tuning seed, is "
        "worse than the median of the completed trials at that epoch: after "
        f"{pruning['startup_trials']} completed trials, and {pruning['warmup_epochs']} epochs of "
        "its own."
    )


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines] + [""]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|")
