"""Runs of several rounds, with lottery-ticket rewinding: everything is rewound, and recorded."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import memfold
from memfold.errors import InputError
from memfold.logging.loggers import ContinuedSteps, MetricsFile
from memfold.training.round_tracker import RoundFolder
from training.networks import DropoutNet
from training.ticket_runs import (
    COUNTS,
    NAMES,
    THREE_ROUNDS,
    TICKETS,
    State,
    load,
    masks,
    metric_rows,
    round_folders,
    run_small,
)


class Recorder(MetricsFile):
    """Keeps the steps at which metrics are logged."""

    def __init__(self, folder: Path, **_: object) -> None:
        super().__init__(folder)
        self.steps: list[int] = []
        self.num_descriptions = 0

    def log_hyperparams(self, *_: object, **__: object) -> None:
        self.num_descriptions += 1

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.append(step)


class ContinuedRecorder(ContinuedSteps, Recorder):
    pass


@pytest.fixture(scope="module")
def starts() -> list[State]:
    """The checkpoints that later rounds started from, filled by the fixture `whole`."""
    return []


@pytest.fixture(scope="module")
def recorders() -> list[ContinuedRecorder]:
    """The loggers of the job beside metrics.csv, filled by the fixture `whole`."""
    return []


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    starts: list[State],
    recorders: list[ContinuedRecorder],
) -> Path:
    """An uninterrupted run of three rounds."""
    folder = tmp_path_factory.mktemp("whole")
    commit = RoundFolder.commit

    def observed(self: RoundFolder, result: Mapping[str, Any], next_start: State) -> None:
        commit(self, result, next_start)
        assert self.start is not None
        starts.append(load(self.start))

    def record(**options: Any) -> ContinuedRecorder:
        recorders.append(ContinuedRecorder(**options))
        return recorders[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundFolder, "commit", observed)
        patch.setattr("memfold.logging.loggers.no_further_logger", record)
        run_small(folder, *THREE_ROUNDS)
    return folder


def test_one_logger_sees_the_steps_of_all_rounds(
    whole: Path, recorders: list[ContinuedRecorder]
) -> None:
    assert whole.is_dir()
    (recorder,) = recorders
    assert recorder.num_descriptions == 1
    assert recorder.steps == sorted(recorder.steps)
    assert (recorder.steps[0], recorder.steps[-1]) == (0, 30 + 17 + 17)


def test_counts_are_exact_and_masks_nested(whole: Path) -> None:
    kept = [masks(load(folder / "checkpoints" / "last.ckpt")) for folder in round_folders(whole)]
    assert [sum(int(mask.sum()) for mask in of_round) for of_round in kept] == COUNTS
    for before, after in pairwise(kept):
        assert all(bool((new <= old).all()) for old, new in zip(before, after, strict=True))


def test_the_smallest_trained_weights_leave(whole: Path) -> None:
    checkpoints = [load(folder / "checkpoints" / "last.ckpt") for folder in round_folders(whole)]
    for before, after in pairwise(checkpoints):
        stay, leave = [], []
        for name, old, new in zip(NAMES, masks(before), masks(after), strict=True):
            magnitudes = before["state_dict"][name].abs()
            stay.append(magnitudes[new[old]])
            leave.append(magnitudes[~new[old]])
        assert torch.cat(stay).min() >= torch.cat(leave).max()


def test_rounds_start_from_the_masked_state_at_the_rewind_step(
    whole: Path, starts: list[State]
) -> None:
    rewind = load(whole / "rounds" / "rewind.ckpt")
    assert (rewind["global_step"], rewind["epoch"]) == (13, 1)
    last = round_folders(whole)[1:]
    assert len(starts) == len(last) == 2
    for start, folder in zip(starts, last, strict=True):
        kept = masks(start)
        trained = masks(load(folder / "checkpoints" / "last.ckpt"))
        assert all(map(torch.equal, kept, trained))
        for name, value in rewind["state_dict"].items():
            if name in NAMES:
                value = value[kept[NAMES.index(name)].flatten()]
            # Positions, and the marks of the state dict that they belong to, are the round's own.
            if not name.startswith(("net.kept_", "net.compression_marks")):
                assert torch.equal(start["state_dict"][name], value), name
        flat = {mask.numel(): mask.flatten() for mask in kept}
        slots = [c["optimizer_states"][0]["state"].values() for c in (start, rewind)]
        for found, expected in zip(*slots, strict=True):
            momentum = expected["momentum_buffer"]
            if len(momentum) in flat:
                momentum = momentum[flat[len(momentum)]]
            assert torch.equal(found["momentum_buffer"], momentum)
        for key in ("loops", "lr_schedulers", "global_step", "epoch"):
            assert start[key] == rewind[key]


def test_every_result_is_recorded_and_the_cost_is_that_of_all(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    rounds = result["rounds"]
    assert rounds[:2] == [
        json.loads((whole / "rounds" / number / "result.json").read_text()) for number in "01"
    ]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert [r["num_values"] for r in rounds] == COUNTS
    assert [r["ratio"] for r in rounds] == [count / 2368 for count in COUNTS]
    assert [r["steps"] for r in rounds] == [30, 17, 17]
    assert result["training"]["rounds"] == 3
    assert result["training"]["steps"] == 64
    assert result["training"]["epochs"] == pytest.approx(6.4)
    assert result["epochs"] == 3
    assert result["metrics"] == rounds[2]["metrics"]
    assert all({"val/acc", "test/acc", "test/loss"} <= r["metrics"].keys() for r in rounds)
    assert result["time"]["fit_seconds"] == sum(r["time"]["fit_seconds"] for r in rounds)
    assert result["compression"]["ratio"] == 710 / 2368
    assert result["parameters"]["trained"] == 710 + 32 + 64 + 10
    stored = [r["memory"]["stored_bytes"] for r in rounds]
    assert sorted(stored, reverse=True) == stored
    assert result["memory"]["stored_bytes"] == stored[2]
    trained = [r["memory"]["train_state_bytes"] for r in rounds]
    assert sorted(set(trained), reverse=True) == trained
    assert result["memory"]["train_state_bytes"] == trained[0]
    for folder, count in zip(round_folders(whole), COUNTS, strict=True):
        model = memfold.load(folder / "model.safetensors", DropoutNet(1, 8, 10))
        assert memfold.footprint(model).num_values == count
        rows = metric_rows(folder)
        assert {float(row[2]) for row in rows if row[2]} == {float(COUNTS.index(count))}
        assert [row[1] for row in rows if row[5]] == ["0", "1", "2"][count < 2368 :]
        text = (folder / "metrics.csv").read_text()
        assert all(f"memory/{key}" in text for key in ("stored_bytes", "train_state_bytes"))
    assert not (whole / "rounds" / "0" / "next.ckpt").exists()


@pytest.mark.parametrize("rewind_steps", [0, 10, 13, 29])
def test_pruning_nothing_repeats_the_first_round_bit_for_bit(
    tmp_path: Path, rewind_steps: int
) -> None:
    nothing = ("ratio=1", "compression.fraction=0", "compression.rounds=3")
    result = run_small(tmp_path, *TICKETS, *nothing, f"compression.rewind_steps={rewind_steps}")
    first, *others = round_folders(tmp_path)
    expected = load(first / "checkpoints" / "last.ckpt")
    assert len(others) == 2
    for folder in others:
        found = load(folder / "checkpoints" / "last.ckpt")
        assert found["state_dict"].keys() == expected["state_dict"].keys()
        for name, tensor in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], tensor), name
        for number, slots in expected["optimizer_states"][0]["state"].items():
            momentum = found["optimizer_states"][0]["state"][number]["momentum_buffer"]
            assert torch.equal(momentum, slots["momentum_buffer"])
        artifacts = [(f / "model.safetensors").read_bytes() for f in (first, folder)]
        assert artifacts[0] == artifacts[1]
        # The epoch in which the round starts has a mean loss over its remaining steps.
        num_whole = 2 * (2 - rewind_steps // 10) + 1
        rows = [[row[:2] + row[3:] for row in metric_rows(f)] for f in (first, folder)]
        assert rows[0][-num_whole:] == rows[1][-num_whole:]
    for key in ("val/acc", "val/loss", "test/acc", "test/loss"):
        assert len({r["metrics"][key] for r in result["rounds"]}) == 1


def test_the_first_round_is_dense_training(whole: Path, tmp_path: Path) -> None:
    run_small(tmp_path, *(t for t in TICKETS if t != "compression=ltr"), "compression=dense")
    dense = load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    ticket = load(whole / "rounds" / "0" / "checkpoints" / "last.ckpt")["state_dict"]
    for name, tensor in dense.items():
        found = ticket.get(f"{name}_values", ticket.get(name))
        assert found is not None
        assert torch.equal(found.flatten(), tensor.flatten()), name


def test_the_best_weights_of_each_round_are_tested(tmp_path: Path) -> None:
    # Without decay the last weights are not always the best.
    jumpy = ("scheduler=constant", "optimizer.lr=0.5", "test_checkpoint=best")
    result = run_small(tmp_path, *THREE_ROUNDS, *jumpy)
    for folder, record in zip(round_folders(tmp_path), result["rounds"], strict=True):
        best = load(folder / "checkpoints" / "best.ckpt")
        assert best["round"]["number"] == record["round"]
        saved = memfold.load(folder / "model.safetensors", DropoutNet(1, 8, 10))
        dense = memfold.densify(saved).state_dict()
        for name, mask, weight in zip(NAMES, masks(best), ("1.weight", "5.weight"), strict=True):
            assert torch.equal(dense[weight][mask], best["state_dict"][name])
        assert record["metrics"]["val/best_acc"] >= record["metrics"]["val/acc"]


def test_a_point_after_the_end_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compression\.rewind_steps=30 must be below 30"):
        run_small(tmp_path, *TICKETS, "compression.rewind_steps=30")
    assert not (tmp_path / "checkpoints").exists()


def test_gradients_may_be_summed_over_batches(tmp_path: Path) -> None:
    nothing = ("ratio=1", "compression.fraction=0", "compression.rounds=2")
    summed = ("trainer.accumulate_grad_batches=3", "compression.rewind_steps=6")
    run_small(tmp_path, *TICKETS, *nothing, *summed)  # 4 steps an epoch, the last of one batch
    states = [load(f / "checkpoints" / "last.ckpt") for f in round_folders(tmp_path)]
    assert [s["global_step"] for s in states] == [12, 12]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], tensor), name


def test_a_strategy_of_one_round_is_a_plain_run(tmp_path: Path) -> None:
    result = run_small(tmp_path, *TICKETS, "ratio=1", "debug=fast")
    assert result["training"] == {"rounds": 1, "epochs": 3, "steps": 6}
    assert "rounds" not in result
    assert not (tmp_path / "rounds").exists()
