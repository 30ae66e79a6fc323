"""Runs of several rounds: the point where later rounds start, and what each leaves behind.

In a run folder:

    rounds/rewind.ckpt   the state after the first steps of round 0
    rounds/<number>/     a complete round: result.json, metrics.csv, checkpoints, model.safetensors,
                         and, in the newest, next.ckpt, from which the next round starts

The folder of a round appears by one rename, once everything is in it. So the round that is being
trained is the first one without a folder, and a run can be killed at any time. What stands in the
run folder itself belongs to that round, and in the end to the last one.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from memfold.compression.rounds import Begin, Rounds
from memfold.errors import InputError
from memfold.files import read_json, sync_folder, write_text_atomically, writing
from memfold.logging.epoch_metrics import CHECKPOINT_KEY
from memfold.logging.loggers import ContinuedSteps
from memfold.runs.folder import ARTIFACT, LAST_CHECKPOINT, METRICS, RESULT, ROUNDS
from memfold.runs.result import without_nonfinite
from memfold.training.callbacks import MemoryMetrics, StepTimer
from memfold.training.checkpoint_io import AtomicCheckpointIO

__all__ = ["RoundFolder", "RoundTracker", "total_of"]

log = logging.getLogger(__name__)

_NEXT = "next.ckpt"
_CHECKPOINTS = LAST_CHECKPOINT.parent
_LARGEST_COUNTS = ("train_state_bytes", "peak_bytes", "grad_sync_bytes")

# Their state describes the round before; everything else that influences training is rewound.
_START_AFRESH = (Checkpoint, MemoryMetrics, StepTimer)


class RoundFolder:
    """What the complete rounds of a run have left on disk. Rank 0 writes."""

    def __init__(self, run: Path) -> None:
        """Take the run folder; nothing is made."""
        self._run = run
        self._rounds = run / ROUNDS
        self.rewind = self._rounds / "rewind.ckpt"

    def results(self) -> list[dict[str, Any]]:
        """Read the results of the complete rounds, in their order.

        Raises:
            InputError: One cannot be read.
        """
        results: list[dict[str, Any]] = []
        while (folder := self._folder(len(results))).is_dir():
            try:
                result = read_json(folder / RESULT)
            except (OSError, ValueError) as error:
                raise InputError(f"{folder / RESULT} cannot be read: start a new run") from error
            if not isinstance(result, dict):
                raise InputError(f"{folder / RESULT} holds no result: start a new run")
            results.append(result)
        return results

    @property
    def number(self) -> int:
        """The round to train now."""
        number = 0
        while self._folder(number).is_dir():
            number += 1
        return number

    @property
    def start(self) -> Path | None:
        """The checkpoint from which that round starts; `None` for round 0."""
        number = self.number
        return self._folder(number - 1) / _NEXT if number > 0 else None

    def commit(self, result: Mapping[str, Any], next_start: dict[str, Any]) -> None:
        """Put what the round has left into its folder, which appears complete or not at all.

        Args:
            result: Of the round that is complete.
            next_start: The checkpoint from which the next round starts.

        Raises:
            InputError: A file cannot be written.
        """
        number = self.number
        partial = self._rounds / f"{number}.partial"
        with writing(partial):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            for file in self._files_of_the_round():
                target = partial / file.relative_to(self._run)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(file, target)
        text = json.dumps(without_nonfinite(result), indent=2)
        write_text_atomically(partial / RESULT, text + "\n")
        AtomicCheckpointIO().save_checkpoint(next_start, partial / _NEXT)
        with writing(partial):
            partial.rename(self._folder(number))
            sync_folder(self._rounds)
            for earlier in range(number):
                (self._folder(earlier) / _NEXT).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what the round before has left in the run folder; its own folder has it.

        Raises:
            InputError: A file cannot be removed.
        """
        for file in self._files_of_the_round():
            with writing(file):
                file.unlink()

    def _folder(self, number: int) -> Path:
        return self._rounds / str(number)

    def _files_of_the_round(self) -> list[Path]:
        files = [self._run / METRICS, self._run / ARTIFACT, *(self._run / _CHECKPOINTS).rglob("*")]
        return [file for file in files if file.is_file()]


class RoundTracker(Callback):
    """Save the point that later rounds start from, and note the round in every checkpoint."""

    def __init__(self, rounds: Rounds, folder: RoundFolder) -> None:
        """Track the round that `folder` says is to be trained now.

        Args:
            rounds: What the strategy says about its rounds.
            folder: Of the run.
        """
        self.rounds = rounds
        self.folder = folder
        self.number = folder.number
        self.first_step = 0
        """Optimizer steps of round 0 that this round does not repeat; known once it trains."""
        self._earlier_steps = sum(result["steps"] for result in folder.results())
        self._rewind_step = 0
        self._last_step = 0

    @property
    def is_last(self) -> bool:
        """Whether no round follows."""
        return self.number == self.rounds.num_rounds - 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out where rounds start, which depends on the length of the training."""
        self._rewind_step = self.rounds.rewind_step(int(trainer.estimated_stepping_batches))
        self.first_step = 0 if self.number == 0 else self._rewind_step
        for logger in trainer.loggers:
            if isinstance(logger, ContinuedSteps):
                logger.earlier_steps = self._earlier_steps - self.first_step
        if trainer.is_global_zero:
            log.info("round %d of %d", self.number, self.rounds.num_rounds)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the point if it is the very beginning."""
        self._last_step = trainer.global_step
        if trainer.global_step == 0:
            self._save_point(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save the point if it lies in mid-epoch."""
        has_stepped = trainer.global_step > self._last_step  # not while gradients are summed up
        self._last_step = trainer.global_step
        if has_stepped and not trainer.is_last_batch:
            self._save_point(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the point if it is the end of an epoch; log the round."""
        pl_module.log("round", float(self.number), sync_dist=True)
        self._save_point(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the round, and the length that all rounds have."""
        checkpoint["round"] = {"number": self.number, "max_epochs": trainer.max_epochs}

    def decide(self) -> Begin | None:
        """Decide what the next round trains, from the weights as they are.

        Returns:
            `None` after the last round.
        """
        return None if self.is_last else self.rounds.next_round(self.number + 1)

    def rewound(self, begin: Begin, trainer: Trainer) -> dict[str, Any]:
        """Return the checkpoint from which the next round starts.

        The module and the optimizer of `trainer` are rewound on the way.

        Args:
            begin: What `decide` returned.
            trainer: It has trained this round.
        """
        task, optimizer = trainer.lightning_module, trainer.optimizers[0]
        checkpoint = torch.load(self.folder.rewind, map_location="cpu", weights_only=True)
        checkpoint.pop(CHECKPOINT_KEY, None)  # the metrics of a round are of its own steps
        task.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        begin(optimizer)
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore
        afresh = {c.state_key for c in callbacks if isinstance(c, _START_AFRESH)}
        states = checkpoint["callbacks"].items()
        return {
            **checkpoint,
            "state_dict": task.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "callbacks": {key: state for key, state in states if key not in afresh},
            "round": {**checkpoint["round"], "number": self.number + 1},
        }

    def _save_point(self, trainer: Trainer) -> None:
        if self.number == 0 and trainer.global_step == self._rewind_step:
            trainer.save_checkpoint(self.folder.rewind)


def total_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the results of all rounds: the last one's, and what all of them cost.

    Args:
        results: Of rounds 0, 1, ...
    """
    last = results[-1]
    return {
        "epochs": last["epochs"],
        "metrics": last["metrics"],
        "memory": {
            **last["memory"],
            **{key: _over(results, "memory", key, max) for key in _LARGEST_COUNTS},
        },
        "time": {**last["time"], "fit_seconds": _over(results, "time", "fit_seconds", sum)},
        "training": {
            "rounds": len(results),
            "epochs": sum(
                result["epochs"] * result["steps"] / (result["first_step"] + result["steps"])
                for result in results
            ),
            "steps": sum(result["steps"] for result in results),
        },
    }


def _over(
    results: Sequence[Mapping[str, Any]],
    group: str,
    key: str,
    combine: Callable[[list[float]], float],
) -> float | None:
    values = [result[group][key] for result in results if result[group][key] is not None]
    return combine(values) if values else None


def _link_or_copy(source: Path, target: Path) -> None:
    if source.name != METRICS:  # all others are replaced, never written to
        try:
            os.link(source, target)
        except OSError:  # some file systems have no links
            pass
        else:
            return
    shutil.copy2(source, target)
