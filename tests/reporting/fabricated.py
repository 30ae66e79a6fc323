"""Run folders with results that nothing was trained for."""

import csv
import json


def result(strategy="stable_rps", ratio=0.1, seed=1, accuracy=0.8, **changes):
    """Return the contents of a `result.json` as a completed run leaves it.

    `section__key=value` changes a value in a section, `section=value` a whole one.
    """
    is_dense = strategy == "dense"
    found = 1.0 if is_dense else 1.0001 * ratio
    contents = {
        "status": "completed",
        "command": f"python train.py compression={strategy} ratio={ratio} seed={seed}",
        "seed": seed,
        "compression": {
            "name": strategy,
            "ratio": found,
            "budget_bytes": None,
            "bits": 32,
            "seed": seed,
            "include": ["*"],
            "exclude": [],
            "min_size": 0,
            "requested_ratio": ratio,
            "index_format": "none" if is_dense else "seed",
        },
        "backbone": "mlp",
        "data": "digits",
        "task": "classification",
        "environment": {"git_commit": "0" * 40, "torch": "2.13.0", "device": "cpu"},
        "distill": None,
        "epochs": 2,
        "max_epochs": 2,
        "training": {"rounds": 1, "epochs": 2.0, "steps": 40},
        "metrics": {"val/acc": accuracy, "test/acc": accuracy, "train/loss": 0.4},
        "memory": {
            "dense_bytes": 100_000,
            "index_bytes": 0 if is_dense else 24,
            "stored_bytes": round(100_000 * found) + (0 if is_dense else 24),
            "train_state_bytes": round(300_000 * found),
            "peak_bytes": 2_000_000,
        },
        "time": {"fit_seconds": 3.5, "step_seconds": 0.01},
        "compute": {"operations": 26_000},
        "test_checkpoint": "last",
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            contents[section][key] = value
        else:
            contents[section] = value
    return contents


def language_result(strategy="stable_rps", ratio=0.1, seed=1, bpb=2.5, **changes):
    """Return the same of a run that is judged by a metric to be minimised."""
    metrics = {"val/bpb": bpb + 0.1, "val/best_bpb": bpb - 0.1, "test/bpb": bpb, "test/ppl": 9.0}
    given = {
        "task": "language_modelling",
        "primary": {"name": "val/bpb", "mode": "min", "unit": "bits per byte"},
        "data": "shakespeare",
        "backbone": "gpt",
        "metrics": metrics,
    }
    return result(strategy, ratio, seed, **(given | changes))


def packed(contents, bits, value, short="acc"):
    """Return the result of the same run with its values in fewer bits."""
    memory = contents["memory"]
    return {
        **contents,
        "compression": {**contents["compression"], "bits": bits},
        "metrics": {
            **contents["metrics"],
            f"packed/test/{short}": value,
            f"packed/val/{short}": value,
        },
        "memory": {**memory, "stored_bytes": memory["stored_bytes"] * bits // 32},
    }


def write_run(folder, contents, rows=()):
    """Write a run folder; `rows` are those of its `metrics.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(contents))
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    return folder


def write_sweep(folder, jobs, started):
    """Write what a sweep keeps of its plan: overrides of all jobs, numbers of those started."""
    (folder / ".sweep" / "jobs").mkdir(parents=True)
    plan = {"command": "", "arguments": [], "jobs": jobs, "attempt": 1}
    (folder / "sweep.json").write_text(json.dumps(plan))
    for number in started:
        note = {"number": number, "folder": str(number), "overrides": jobs[number], "attempt": 1}
        (folder / ".sweep" / "jobs" / f"{number}.json").write_text(json.dumps(note))
    return folder


def reasons(problems):
    """Return the reason of each problem, by the last part of its folder."""
    return {problem.folder.rpartition("/")[2]: problem.reason for problem in problems}
