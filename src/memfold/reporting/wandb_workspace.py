"""The comparison as a workspace of Weights & Biases: what `logger=wandb` logs, in pictures.

Needs the extra `wandb`. Panels name what `memfold.logging.wandb_values` writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import wandb_workspaces.expr as filters
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2.interface import ParallelCoordinatesPlotColumn
from wandb_workspaces.workspaces.internal import View

from memfold.errors import InputError
from memfold.files import read_json
from memfold.reporting.metrics import axis_title, name_of
from memfold.reporting.styles import styles
from memfold.runs.primary import ACCURACY, Primary

__all__ = ["Selection", "build_workspace", "read_workspace", "write_workspace"]


_STEP = "trainer/global_step"
_METRICS = {  # of classification, language modelling and regression -> its summary value
    ACCURACY: "accuracy",
    Primary("val/bpb", "min", "bits per byte"): "bpb",
    Primary("val/rmse", "min", "RMSE"): "rmse",
}
_MOST_RUNS = 500
_PLANES = {  # summary value -> title of the axis
    "memory/stored_bytes": "stored bytes",
    "ratio": "ratio: stored values over compressible weights",
    "memory/peak_bytes": "peak memory of training, bytes",
    "time/fit_seconds": "training time, seconds",
    "training/rounds": "number of trainings",
    "compute/operations": "multiply-adds of a forward pass for each token or sample",
}
_MEMORY = {
    "memory/stored_bytes": "Stored bytes",
    "memory/train_state_bytes": "Train state: parameters, gradients, optimizer; bytes",
    "memory/peak_bytes": "Peak memory of training, bytes",
    "memory/grad_sync_bytes": "Gradients that DDP sends in a step, bytes",
}
_CURVES = ("train/loss", "val/loss", "lr")
_COLUMNS = (
    "config:method.value",
    "config:backbone.value",
    "config:data.value",
    "config:requested_ratio.value",
    "summary:ratio",
    "config:bits.value",
    "summary:memory/stored_bytes",
    "summary:memory/stored_ratio",
    *(
        f"summary:{key}"
        for metric, value in _METRICS.items()
        for key in (value, f"val/best_{metric.short}")
    ),
    "summary:memory/train_state_bytes",
    "summary:memory/peak_bytes",
    "summary:training/rounds",
    "summary:time/fit_seconds",
    "config:seed.value",
    "config:optimizer.lr.value",  # one key with a dot in it
    "run:group",
)


@dataclass(frozen=True)
class Selection:
    """Which runs are compared: those that completed, without the trials of tuning."""

    groups: Sequence[str] = ()
    """Of these groups, such as the names of sweeps; all where there are none."""
    data: str | None = None
    """On this data set."""
    backbone: str | None = None
    """With this backbone."""

    def to_filter(self) -> filters.And:
        """Return what W&B filters by."""
        found = [filters.Metric("State") == "finished", filters.Metric("JobType") != "tune"]
        if self.groups:
            found.append(filters.Metric("Group").isin(list(self.groups)))
        for key, value in (("data", self.data), ("backbone", self.backbone)):
            if value is not None:
                found.append(filters.Config(key) == value)
        return filters.And(*found)


def build_workspace(
    entity: str, project: str, name: str, selection: Selection
) -> workspaces.Workspace:
    """Describe the comparison; nothing is sent.

    Runs are grouped by strategy, then by setting (all that a run was asked for but its seed, with
    data set and backbone): a point is a mean over seeds.

    Args:
        entity: W&B user or team.
        project: W&B project.
        name: Title of the workspace.
        selection: The runs.
    """
    from memfold.strategies import strategy_names  # only here: it imports PyTorch

    kept = [_kept(metric, value) for metric, value in _METRICS.items()]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*kept, _memory(), _curves(), _differences()],
        settings=workspaces.WorkspaceSettings(x_axis=_STEP, max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            filters=selection.to_filter(),
            groupby=[filters.Config("strategy"), filters.Config("setting")],
            order=[filters.Ordering(filters.Summary("memory/stored_bytes"), ascending=False)],
            group_colors={key: style.colour for key, style in styles(strategy_names()).items()},
            pinned_columns=list(_COLUMNS),
        ),
    )


def write_workspace(workspace: workspaces.Workspace, path: Path) -> None:
    """Write the definition as wandb-workspaces sends it, with entity, project and title.

    Raises:
        InputError: The file cannot be written.
    """
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read_workspace(path: Path, changes: Mapping[str, str]) -> workspaces.Workspace:
    """Read what `write_workspace` has written.

    Args:
        path: The file.
        changes: Other values for `entity`, `project` or `displayName`.

    Raises:
        InputError: The file cannot be read, or is no such definition.
    """
    try:
        definition = read_json(path)
        if not isinstance(definition, dict):
            raise TypeError
        view = View.model_validate({**definition, **changes})
        return workspaces.Workspace._from_model(view)
    except OSError as error:
        raise InputError(f"--from {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"--from {path} is no workspace that this script has written") from error


def _kept(metric: Primary, value: str) -> workspaces.Section:
    name, curve = name_of(metric), metric.name
    planes = [
        panels.ScatterPlot(
            title=f"Test {name} over {axis}",
            x=panels.SummaryMetric(key),
            y=panels.SummaryMetric(value),
            log_x=True,
            legend_template="${config:setting}",
        )
        for key, axis in _PLANES.items()
    ]
    axes = {"strategy": panels.Config("strategy"), "bits": panels.Config("bits")}
    axes |= {key: panels.SummaryMetric(key) for key in ("memory/stored_bytes", value)}
    columns = [
        ParallelCoordinatesPlotColumn(metric, log=True if "bytes" in key else None)
        for key, metric in axes.items()
    ]
    together = panels.ParallelCoordinatesPlot(title=f"From strategy to {name}", columns=columns)
    bars = _bars(value, f"Test {name}")
    lines = [
        _line(curve, f"{curve} of each strategy: mean over ratios and seeds", "strategy"),
        _line(curve, f"{curve}: mean over seeds", "setting"),
    ]
    title = axis_title(metric).removeprefix("test ")
    return _section(f"Kept: {title}", [*planes, bars, together, *lines], columns=2)


def _memory() -> workspaces.Section:
    return _section("Memory", [_bars(key, title) for key, title in _MEMORY.items()], columns=2)


def _curves() -> workspaces.Section:
    lines = [_line(key, f"{key}: mean over seeds", "setting") for key in _CURVES]
    return _section("Training curves", lines, columns=2)


def _line(key: str, title: str, group: str) -> panels.LinePlot:
    return panels.LinePlot(
        title=title,
        x=_STEP,
        y=[key],
        title_x="optimizer step",
        groupby=panels.Config(group),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=_MOST_RUNS,
    )


def _differences() -> workspaces.Section:
    return _section("What differs", [panels.RunComparer(diff_only="split")], columns=1)


def _bars(key: str, title: str) -> panels.BarPlot:
    return panels.BarPlot(
        title=f"{title}, mean and deviation over seeds",
        metrics=[key],
        groupby=panels.Config("setting"),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=_MOST_RUNS,
        max_bars_to_show=50,
    )


def _section(name: str, content: list, columns: int) -> workspaces.Section:
    rows = -(-len(content) // columns)
    return workspaces.Section(
        name=name,
        panels=content,
        is_open=True,
        layout_settings=workspaces.SectionLayoutSettings(columns=columns, rows=rows),
        panel_settings=workspaces.SectionPanelSettings(x_axis=_STEP),
    )
