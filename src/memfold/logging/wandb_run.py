"""Weights & Biases: what a run logs there, and under which names. docs/wandb.md lists them."""

import html
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

from memfold.errors import InputError
from memfold.logging.loggers import ContinuedSteps
from memfold.logging.run_labels import LONGEST_TAG
from memfold.logging.wandb_credentials import has_wandb_key
from memfold.logging.wandb_values import flat_facts, flat_settings, flat_summary
from memfold.processes.ranks import is_rank_zero

__all__ = ["WandbRun", "close_wandb", "wandb_logger"]

_LONGEST_NAME = 128  # characters that W&B takes
_LONGEST_LABELS = {"project": 128, "entity": 128, "name": 128, "group": 128, "job_type": 64}
_CODE_VARIABLES = ("WANDB_SAVE_CODE", "WANDB_DISABLE_CODE", "WANDB_DISABLE_GIT")
_MODES = ("online", "offline", "disabled")


class WandbRun(ContinuedSteps, WandbLogger):
    """Lightning's logger with a flat configuration, a final summary and the artifact."""

    def __init__(
        self, run: Any = None, *, folder: Path, project: str, log_artifact: bool = False
    ) -> None:
        """Take over a run that was started.

        Args:
            run: From `wandb.init`; `None` on the ranks that start none.
            folder: The run folder.
            project: W&B project.
            log_artifact: Whether to log the artifact at the end.
        """
        super().__init__(experiment=run, save_dir=folder, project=project)
        self._log_artifact = log_artifact
        # What the agent of a W&B sweep has set is locked.
        self._locked: frozenset[str] = frozenset()
        if run is not None and run.sweep_id:
            self._locked = frozenset(run.config.keys())

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Log the configuration: every key as on the command line, without what is not searched."""
        self._configure(flat_settings(params))

    @rank_zero_only
    def describe(self, facts: Mapping[str, Any]) -> None:
        """Log what the run turned out to be: strategy, ratio, stored bytes, versions.

        Args:
            facts: Names, counts and choices as `flat_facts` takes them.
        """
        self._configure(flat_facts(facts))

    @rank_zero_only
    def conclude(self, result: Mapping[str, Any], artifact: Path) -> None:
        """Log the final values, whatever was logged last, and the artifact if it is wanted.

        The text that a language model has drawn is a page: a table would leave a copy in the user's
        home.
        """
        if "sample" in result:
            page = f"<pre>{html.escape(result['sample'])}</pre>"
            self.experiment.log({"sample": wandb.Html(page)})
        summary = flat_summary(result)
        self._configure(flat_facts(result))
        self.experiment.summary.update(summary)
        if self._log_artifact:
            self._upload(artifact, {**result["memory"], **_plain(result["compression"])})

    def _configure(self, values: Mapping[str, Any]) -> None:
        free = {key: value for key, value in values.items() if key not in self._locked}
        self.experiment.config.update(free, allow_val_change=True)

    def _upload(self, path: Path, metadata: dict[str, Any]) -> None:
        run = self.experiment
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(run.name))
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        # No copy in the user's home; offline, the file stays where `wandb sync` finds it.
        artifact.add_file(str(path), policy="immutable")
        run.log_artifact(artifact)


def wandb_logger(
    folder: Path,
    run_name: str,
    tags: list[str],
    *,
    project: str,
    entity: str | None,
    mode: str | None,
    name: str | None,
    group: str | None,
    job_type: str | None,
    log_artifact: bool,
    save_code: bool,
) -> Logger:
    """Start a Weights & Biases run, which continues the one that `folder` holds already.

    Args:
        folder: The run folder; W&B makes `wandb/` in it.
        run_name: The name of the run when `name` is `None`.
        tags: Tags of the run.
        project: W&B project.
        entity: W&B user or team; `None`: the default of the account.
        mode: online, offline or disabled; `None`: WANDB_MODE, else online when W&B has
            credentials, else offline.
        name: The name of the run.
        group: Groups the runs of a sweep.
        job_type: `None`: sweep where the agent of a W&B sweep starts the run, else train.
        log_artifact: Log `model.safetensors` as a W&B artifact at the end.
        save_code: Log the uncommitted changes of tracked files, and the program; W&B's own
            variables (WANDB_SAVE_CODE, WANDB_DISABLE_CODE, WANDB_DISABLE_GIT) come first.

    Raises:
        InputError: An option is wrong, or W&B cannot start.
    """
    mode = _mode(mode)
    _refuse_long(project=project, entity=entity, name=name, group=group, job_type=job_type)
    if long := [tag for tag in tags if not 0 < len(str(tag)) <= LONGEST_TAG]:
        raise InputError(f"logger.tags must have 1 to {LONGEST_TAG} characters each, got {long}")
    if not isinstance(log_artifact, bool):
        raise InputError(f"logger.log_artifact must be true or false, got {log_artifact!r}")
    if not is_rank_zero():  # a stand-in: only rank 0 starts a run
        return WandbRun(folder=folder, project=project)
    try:
        run = wandb.init(
            project=project,
            entity=entity,
            name=str(name or run_name)[:_LONGEST_NAME],
            group=None if group is None else str(group),
            job_type=job_type or ("sweep" if os.environ.get("WANDB_SWEEP_ID") else "train"),
            tags=list(dict.fromkeys(map(str, tags))),
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            id=_earlier_id(folder),
            resume="allow",
            settings=_settings(mode, save_code),
        )
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"logger=wandb cannot start: {reason}; "
            "logger.mode=offline or logger=csv needs no server"
        ) from error
    # The count of log calls, W&B's own x-axis, means nothing.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbRun(run, folder=folder, project=project, log_artifact=log_artifact)


def close_wandb(*, failed: bool) -> str | None:
    """End the W&B run of this process, if there is one.

    Returns:
        The command that uploads the run, when it was written offline.
    """
    if not is_rank_zero():
        return None
    run = wandb.run
    if run is None:
        return None
    # A resumed run has one folder for each time it was started; W&B joins them by the run's id.
    folders = sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"))
    is_offline = run.offline and not run.disabled
    run.finish(exit_code=int(failed))
    return shlex.join(["wandb", "sync", *map(str, folders)]) if is_offline else None


def _mode(mode: str | None) -> str:
    mode = mode or os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    if mode not in _MODES:
        raise InputError(
            f"logger.mode must be one of {', '.join(_MODES)} or null, and so must WANDB_MODE, "
            f"got {mode!r}"
        )
    return mode


def _refuse_long(**labels: str | None) -> None:
    """Refuse what W&B would refuse when the run is uploaded, which may be days later."""
    for name, label in labels.items():
        longest = _LONGEST_LABELS[name]
        if label is not None and not 0 < len(str(label)) <= longest:
            raise InputError(
                f"logger.{name} must have 1 to {longest} characters, got {len(str(label))}"
            )


def _settings(mode: str, save_code: bool) -> wandb.Settings:
    is_decided = any(os.environ.get(variable) for variable in _CODE_VARIABLES)
    return wandb.Settings(
        console="off",
        silent=mode != "online",
        git_root=_clone(),
        save_code=None if is_decided else save_code,
    )


def _clone() -> str | None:
    """Return the clone that memfold runs from: its state is logged, wherever the run starts."""
    folders = Path(__file__).resolve().parents
    return next((str(folder) for folder in folders if (folder / ".git").exists()), None)


def _earlier_id(folder: Path) -> str | None:
    """Read the id from `wandb/run-<time>-<id>` or `wandb/offline-run-<time>-<id>`."""
    runs = sorted((folder / "wandb").glob("*run-*-*"), key=lambda run: run.stat().st_mtime)
    return runs[-1].name.split("run-", 1)[1].partition("-")[2] if runs else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
