"""The table at the end of a run."""

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_summary"]


def print_summary(result: dict[str, Any], folder: str) -> None:
    """Print accuracy, parameters, bytes and time of a completed run.

    Args:
        result: What `result.json` holds.
        folder: The run folder.
    """
    metrics, parameters = result["metrics"], result["parameters"]
    memory, times = result["memory"], result["time"]
    table = Table(show_header=False, title=f"{result['backbone']} on {result['data']}")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "compression": f"{result['compression']['name']}, ratio "
        f"{result['compression']['ratio']:.4g}",
        f"test accuracy ({result['test_checkpoint']} weights)": _percent(metrics.get("test/acc")),
        "validation accuracy": _percent(metrics.get("val/acc")),
        "parameters trained": f"{parameters['trained']:,} of {parameters['dense']:,}",
        "stored bytes": f"{memory['stored_bytes']:,} of {memory['dense_bytes']:,}",
        "stored ratio": f"{memory['stored_ratio']:.4g}",
        "artifact bytes": f"{memory['artifact_bytes']:,}",
        "train state bytes": f"{memory['train_state_bytes'] or 0:,}",
        "peak bytes": f"{memory['peak_bytes']:,}",
        "time": f"{times['fit_seconds']:.1f} s"
        + (f", {1000 * times['step_seconds']:.1f} ms a step" if times["step_seconds"] else ""),
    }
    if result["epochs"] < result["max_epochs"]:
        rows["stopped early"] = f"after epoch {result['epochs']} of {result['max_epochs']}"
    training = result["training"]
    if training["rounds"] > 1:
        rows["trained"] = f"{training['rounds']} rounds, {training['epochs']:.4g} epochs in all"
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False, markup=False)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
