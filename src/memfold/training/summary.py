"""The table at the end of a run."""

from typing import Any

from rich.console import Console
from rich.table import Table

from memfold.runs.data_names import name_data, source_of
from memfold.runs.primary import primary_of, show_number

__all__ = ["print_summary"]


def print_summary(result: dict[str, Any], folder: str) -> None:
    """Print the primary metric, parameters, bytes and time of a completed run.

    Args:
        result: What `result.json` holds.
        folder: The run folder.
    """
    metrics, parameters = result["metrics"], result["parameters"]
    memory, times = result["memory"], result["time"]
    primary = primary_of(result)
    weights = f"{result['test_checkpoint']} weights" + (", averaged" if result.get("ema") else "")
    (data,) = name_data([(result["data"], source_of(result))])
    table = Table(show_header=False, title=f"{result['backbone']} on {data}")
    table.add_column(style="bold")
    table.add_column(justify="right")
    compression, samples = result["compression"], result["samples"]
    untouched = compression.get("untouched_bits", 32)
    merges = compression.get("merge_norms", False)
    is_packed = compression["bits"] != 32 or untouched != 32 or merges
    others = [
        f"{name.removeprefix('test/')} {show_number(value)}"
        for name, value in metrics.items()
        if name.startswith("test/") and name not in ("test/loss", primary.test)
    ]
    ratio, asked = (
        None if compression[key] is None else f"{compression[key]:.3g}"
        for key in ("ratio", "requested_ratio")
    )
    rows: dict[str, str | None] = {
        "compression": f"{compression['name']}, ratio {ratio}"
        + (f" (nearest to {asked})" if asked not in (None, ratio) else "")
        + (f", stored in {compression['bits']} bits" if is_packed else "")
        + (f", untouched in {untouched}" if untouched != 32 else "")
        + (", norms merged" if merges else ""),
        "samples to train, validate, test": " / ".join(f"{n:,}" for n in samples.values()),
        f"test {primary.title} ({weights})": primary.show(metrics.get(primary.test)),
        f"test {primary.title} as stored": primary.show(primary.tested(metrics))
        if is_packed
        else None,
        "other metrics of the test": ", ".join(others) or None,
        f"validation {primary.title}": primary.show(metrics.get(primary.name)),
        "parameters trained": f"{parameters['trained']:,} of {parameters['dense']:,}",
        "stored bytes": f"{memory['stored_bytes']:,} of {memory['dense_bytes']:,}",
        "stored ratio": f"{memory['stored_ratio']:.4g}",
        "artifact bytes": f"{memory['artifact_bytes']:,}",
        "train state bytes": f"{memory['train_state_bytes'] or 0:,}",
        "peak bytes": f"{memory['peak_bytes']:,}",
        "time": f"{times['fit_seconds']:.1f} s"
        + (f", {1000 * times['step_seconds']:.1f} ms a step" if times["step_seconds"] else ""),
    }
    if "tokenizer_bytes" in memory:  # beside what is stored of the model
        rows["tokenizer bytes"] = f"{memory['tokenizer_bytes']:,}"
    if result["epochs"] < result["max_epochs"]:
        rows["stopped early"] = f"after epoch {result['epochs']} of {result['max_epochs']}"
    training = result["training"]
    if training["rounds"] > 1:
        rows["trained"] = f"{training['rounds']} rounds, {training['epochs']:.4g} epochs in all"
    for label, value in (result.get("references") or {}).items():
        rows[f"test {primary.title} of {label}"] = primary.show(value)
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, value)
    console = Console()
    console.print(table)
    if result.get("sample"):
        # Drawn characters may be those that control a terminal.
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in result["sample"])
        console.print(f"a sample:\n{shown}\n", soft_wrap=True, highlight=False, markup=False)
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
