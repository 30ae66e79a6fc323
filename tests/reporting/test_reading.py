import errno
import json
import os
import shutil

import pytest

from memfold.reporting.reading import read
from memfold.reporting.records import Curve, Problem, Setting
from reporting.fabricated import packed, reasons, result, write_run, write_sweep


def test_a_run_says_what_its_result_says(here):
    write_run(here / "one", result(distill=None), [{"step": 19, "val/acc": 0.5, "lr": 0.1}])
    (run,), problems = read(["one"])
    assert problems == []
    assert (run.folder, run.setting, run.method) == ("one", Setting("digits", "mlp"), "stable_rps")
    assert (run.ratio, run.requested_ratio, run.bits, run.seed) == (0.10001, 0.1, 32, 1)
    assert (run.test, run.stored_bytes, run.index_bytes) == (0.8, 10_025, 24)
    assert (run.epochs, run.steps, run.peak_bytes, run.fit_seconds) == (2, 40, 2_000_000, 3.5)
    assert (run.rounds, run.operations) == (1, 26_000)
    assert run.curves == {"val/acc": Curve((19,), (0.5,))}
    assert set(run.options) == {"include", "exclude", "min_size"}


def test_runs_are_found_at_any_depth_and_once(here):
    write_run(here / "a" / "b" / "c", result(seed=1))
    write_run(here / "a" / "d", result(seed=2))
    (here / "a" / ".git").mkdir()
    write_run(here / "a" / ".git" / "hidden", result(seed=3))
    runs, problems = read(["a", "a/d", here / "a" / "b" / ".." / "d"])
    assert [run.folder for run in runs] == ["a/b/c", "a/d"]
    assert problems == []


def test_what_lies_inside_a_run_is_no_run(here):
    folder = write_run(here / "ticket", result("ltr"))
    write_run(folder / "rounds" / "0", result("ltr", accuracy=0.9))
    write_run(folder / "wandb" / "x", result("ltr", accuracy=0.9))
    (run,), problems = read([here])
    assert (run.folder, problems) == ("ticket", [])


def test_the_trials_of_a_study_are_not_read(here):
    (here / "study.db").touch()
    write_run(here / "trials" / "0" / "s1", result(accuracy=0.1))
    write_run(here / "test" / "s1", result())
    (run,), problems = read([here])
    assert (run.folder, problems) == ("test/s1", [])


def test_packed_values_are_runs_at_fewer_bits(here):
    contents = result()
    folder = write_run(here / "one", contents, [{"step": 1, "val/acc": 0.5}])
    for bits, accuracy in ((8, 0.79), (4, 0.7)):
        write_run(folder / "packed" / str(bits), packed(contents, bits, accuracy))
    runs, problems = read(["one"])
    assert problems == []
    assert [(r.folder, r.bits, r.test) for r in runs] == [
        ("one", 32, 0.8),
        ("one", 8, 0.79),
        ("one", 4, 0.7),
    ]
    assert [bool(run.curves) for run in runs] == [True, False, False]


def test_a_run_trained_for_8_bits_is_judged_by_its_artifact(here):
    write_run(here / "one", packed(result(), 8, 0.75))
    (run,), _ = read(["one"])
    assert (run.bits, run.test, run.val) == (8, 0.75, 0.75)


def test_bytes_were_asked_for_at_the_bits_of_the_training(here):
    asked = {"requested_ratio": None, "budget_bytes": 10_100}
    asked = {f"compression__{key}": value for key, value in asked.items()}
    full = result(**asked)
    folder = write_run(here / "a", full)
    write_run(folder / "packed" / "8", packed(full, 8, 0.79))
    write_run(here / "b", packed(result(ratio=0.4, **asked), 8, 0.9))
    runs, problems = read([here])
    assert problems == []
    assert {(run.folder, run.bits): run.request for run in runs} == {
        ("a", 32): ("budget_bytes", 10_100),
        ("a", 8): ("found", 0.1),
        ("b", 8): ("budget_bytes", 10_100),
    }


def test_a_damaged_packed_result_is_named(here):
    folder = write_run(here / "one", result())
    write_run(folder / "packed" / "8", {**packed(result(), 8, 0.5), "memory": None})
    runs, problems = read(["one"])
    assert len(runs) == 1
    assert problems == [Problem("one/packed/8", "memory must be a mapping, got None")]


def test_dense_asks_for_nothing_even_in_a_sweep_over_ratios(here):
    write_run(here / "0", result("dense", ratio=0.1))
    write_run(here / "1", result("dense", ratio=0.01))
    (run,), problems = read([here])
    assert run.requested_ratio is None
    assert problems == []
    write_run(here / "2", result("dense", ratio=0.1))
    (run,), problems = read([here])
    assert problems == [Problem("2", "repeats 0, with the same result (dense, seed 1); left out")]


def test_what_was_only_tried_for_a_choice_is_no_result(here):
    write_run(here / "runs" / "a", result("mag", ratio=0.1))
    write_run(here / "choices" / "b", result("mag", ratio=0.1, seed=11))
    runs, _ = read([here])
    assert len(runs) == 2
    (here / "choices.csv").write_text("method,ratio\n")
    (run,), problems = read([here])
    assert (run.folder, problems) == ("runs/a", [])


def test_runs_that_failed_before_they_had_a_folder_are_named(here):
    write_run(here / "a", result("mag", ratio=0.1))
    for name in "abc":
        (here / f"{name}.overrides.json").write_text("[]")
    (here / "b.txt").write_text("warning\nerror: compression=magg is unknown\n")
    (run,), problems = read([here])
    assert run.folder == "a"
    assert problems == [
        Problem("b", "failed: compression=magg is unknown"),
        Problem("c", "no run folder: not started, or failed at once"),
    ]


def test_methods_are_named_by_the_options_in_which_their_runs_differ(here):
    write_run(here / "a", result(compression__gradient_scale="length"))
    write_run(here / "b", result(compression__gradient_scale="projection"))
    write_run(here / "c", result("mag", compression__scope="global", compression__rounds=1))
    write_run(here / "d", result("mag", seed=2, compression__scope="global"))
    write_run(here / "e", result("snip", compression__exclude=["head"]))
    write_run(here / "f", result("snip", compression__exclude=[]))
    runs, _ = read([here])
    assert {run.folder: run.method for run in runs} == {
        "a": "stable_rps (gradient_scale=length)",
        "b": "stable_rps (gradient_scale=projection)",
        "c": "mag",
        "d": "mag",  # of a version without `rounds`
        "e": 'snip (exclude=["head"])',
        "f": "snip (exclude=[])",
    }


def test_a_teacher_given_weights_and_an_average_are_part_of_the_method(here):
    teacher = {"run": "x", "backbone": "resnet20", "compression": {"name": "dense"}}
    distill = {"teacher": teacher, "temperature": 4.0, "weight": 0.9}
    write_run(here / "a", result(distill=distill))
    write_run(here / "b", result("mag"))
    write_run(here / "c", result("mag", ema={"decay": 0.99}))
    write_run(here / "d", result("mag", init_from={"source": "/data/first/w.pt"}))
    runs, problems = read([here])
    assert problems == []
    assert {r.method for r in runs} == {
        "stable_rps (distill=resnet20 dense)",
        "mag",
        "mag (ema=0.99)",
        "mag (init_from=first/w.pt)",
    }


def test_jobs_of_a_sweep_that_never_ran_are_missing(here):
    jobs = [["compression=mag", f"seed={seed}"] for seed in range(4)]
    write_sweep(here / "sweep", jobs, started=[0, 1, 3])
    write_run(here / "sweep" / "0", result("mag", seed=0))
    write_run(here / "sweep" / "3", result("mag", seed=3))
    runs, problems = read(["sweep"])
    assert [run.seed for run in runs] == [0, 3]
    assert problems == [
        Problem("sweep", "missing: job 2 never started (compression=mag seed=2)"),
        Problem("sweep/1", "no result.json"),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": [1]}', '{"jobs": {"0": []}}'])
def test_a_damaged_plan_does_not_hide_the_runs(here, text):
    write_run(here / "sweep" / "0", result())
    (here / "sweep" / "sweep.json").write_text(text)
    runs, problems = read(["sweep"])
    assert len(runs) == 1
    assert reasons(problems)["sweep"].endswith("jobs that never started are not known")


def test_folders_without_a_result(here):
    (here / "killed" / ".hydra").mkdir(parents=True)
    (here / "folder" / "result.json").mkdir(parents=True)
    (here / "empty").mkdir()
    assert read(["killed"]) == ([], [Problem("killed", "no result.json")])
    assert read(["empty"]) == ([], [Problem("empty", "holds no run")])
    assert read(["folder"]) == ([], [Problem("folder", "holds no run")])
    assert read(["nowhere"]) == ([], [Problem("nowhere", "does not exist")])


def test_of_two_runs_with_one_seed_the_first_is_kept(here):
    write_run(here / "job10", result(accuracy=0.6))
    write_run(here / "job2", result(accuracy=0.7))
    (run,), problems = read(["job10", "job2"])
    assert run.folder == "job2"
    assert problems == [
        Problem(
            "job10",
            "repeats job2, with test accuracy 0.6000 where that has 0.7000 "
            "(stable_rps 0.1, seed 1); left out",
        )
    ]


def test_other_data_and_other_backbones_are_other_settings(here):
    write_run(here / "a", result())
    write_run(here / "b", result(backbone="cnn"))
    write_run(here / "c", result(data="mnist"))
    runs, problems = read([here])
    assert len({run.setting for run in runs}) == 3
    assert problems == []


def test_seeds_that_were_trained_for_different_times_are_named(here):
    write_run(here / "a", result(seed=1))
    write_run(here / "b", result(seed=2, training={"epochs": 3.0, "steps": 60}))
    runs, problems = read([here])
    assert len(runs) == 2
    assert problems == [
        Problem("digits, mlp", "averaged seeds of stable_rps 0.1 differ in epochs: 2, 3")
    ]


def test_other_training_data_in_one_setting_is_named(here):
    write_run(here / "a", result())
    write_run(here / "b", result("mag", training={"epochs": 2.0, "steps": 80}))
    _, problems = read([here])
    assert "so in training data or batch size: 20 in a, 40 in b" in reasons(problems)["digits, mlp"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,val/acc\n1,0.5\n",
        "step,val/acc\n1,0.5\n2\n",
        "step,val/acc\n1,high\n",
        "step,density/a\n1,1.5\n",
        "\xff\n",
        f"step,val/acc\n{10**400},1\n",
        "step,val/acc\n-1,1\n",
        "step,val/acc\n" + "1," * 2**20,
    ],
    ids=[
        "empty",
        "no step",
        "truncated",
        "no number",
        "density",
        "no text",
        "huge step",
        "negative step",
        "long line",
    ],
)
def test_a_damaged_metrics_file_costs_the_curves_only(here, text):
    write_run(here / "a", result())
    (here / "a" / "metrics.csv").write_bytes(text.encode("latin-1"))
    (run,), (problem,) = read(["a"])
    assert run.curves == {}
    assert problem.folder == "a"
    assert problem.reason.startswith("metrics.csv: ")


def test_pipes_are_named_and_the_rest_is_read(here):
    write_run(here / "good", result())
    write_run(here / "bad", result(seed=2))
    (here / "bad" / "result.json").unlink()
    for name in ("bad/result.json", "good/metrics.csv", "sweep.json", "gone.txt"):
        os.mkfifo(here / name)
    (here / "gone.overrides.json").write_text("[]")
    runs, problems = read([here])
    assert [run.folder for run in runs] == ["good"]
    assert {problem.folder for problem in problems} == {".", "bad", "gone", "good"}
    assert [p.folder for p in problems if "is no regular file" in p.reason] == [".", "bad", "good"]
    os.mkfifo(here / "runs.jsonl")
    assert read([here / "runs.jsonl"]) == ([], [Problem("runs.jsonl", "does not exist")])


def test_curves_are_thinned_and_densities_are_the_last(here):
    rows = [{"step": n, "train/loss": 1 / (n + 1)} for n in range(1000)]
    rows += [{"step": 10, "density/a.weight": 0.5}, {"step": 20, "density/a.weight": 0.25}]
    rows += [{"step": 999, "train/loss": "nan"}]
    write_run(here / "a", result("rigl"), rows)
    (run,), problems = read(["a"])
    curve = run.curves["train/loss"]
    assert len(curve.steps) == 200
    assert (curve.steps[0], curve.steps[-1], curve.values[0]) == (0, 999, 1.0)
    assert run.densities == {"a.weight": 0.25}
    assert problems == []


def test_layers_keep_the_order_of_the_model(here):
    row = {"step": 1, "density/stem": 0.3, "density/blocks.10": 0.2, "density/blocks.9": 0.1}
    write_run(here / "a", result("mag"), [row])
    (run,), _ = read(["a"])
    assert list(run.densities) == ["stem", "blocks.10", "blocks.9"]


def test_a_command_can_be_typed_again_elsewhere(here):
    command = (
        "python /home/me/train.py --config-name train --config-path /home/me/conf compression=mag "
        "hydra.mode=RUN 'hydra.run.dir='\"'\"'/tmp/a b/0'\"'\"'' hydra.job.num=0"
    )
    write_run(here / "a", result(command=command))
    (run,), _ = read(["a"])
    assert run.command == "python train.py compression=mag"


def test_a_link_to_a_run_is_the_same_run(here):
    write_run(here / "a", result())
    (here / "b").symlink_to("a")
    assert len(read(["a", "b"])[0]) == 1
    assert read(["a", "b"])[1] == []


def test_links_to_runs_are_followed_and_others_are_not(here):
    write_run(here / "runs" / "b", result(seed=2))
    write_run(here / "elsewhere" / "a", result())
    for name, target in (("a", "elsewhere/a"), ("back", "runs"), ("far", "elsewhere")):
        (here / "runs" / name).symlink_to(here / target)
    (here / "runs" / "b" / "self").symlink_to(here / "runs" / "b")
    runs, problems = read(["runs"])
    assert [(run.folder, run.seed) for run in runs] == [("runs/a", 1), ("runs/b", 2)]
    assert problems == []


def test_a_folder_that_cannot_be_listed_is_named(here, monkeypatch):
    write_run(here / "runs" / "a", result())
    (here / "runs" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    runs, problems = read(["runs"])
    assert len(runs) == 1
    assert problems == [Problem("runs/locked", "cannot be read: Permission denied")]


def test_everything_can_be_read_from_a_copy_elsewhere(here):
    write_run(here / "a", result())
    shutil.copytree(here / "a", here / "copy" / "a")
    (run,), _ = read(["copy"])
    assert run.folder == "copy/a"
    assert json.loads((here / "a" / "result.json").read_text())["seed"] == run.seed
