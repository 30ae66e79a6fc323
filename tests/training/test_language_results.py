"""What a run on text leaves beside its metrics: a sample, both ends, the tokenizer's bytes."""

import html
import json
from pathlib import Path
from typing import Any

import pytest

from memfold.training import run
from training.jobs import compose_job
from training.wandb_files import offline_runs

GPT = ("data=text", "backbone=gpt", "backbone.width=8", "backbone.depth=1", "backbone.num_heads=2")
OPTIONS = (*GPT, "data.length=16", "optimizer=adamw", "trainer=cpu", "~callbacks.progress_bar")


def run_on_text(folder: Path, *overrides: str) -> dict[str, Any]:
    file = folder / "text.txt"
    folder.mkdir(exist_ok=True)
    file.write_text("\n".join(f"line {i} of the text; {i * i} is its square." for i in range(200)))
    options = (*OPTIONS, f"data.files=[{file}]", f"data.root={folder}", "debug=fast", *overrides)
    return run(compose_job(folder / "run", *options))


def test_tensorboard_has_the_sample_and_the_result_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("logger=tensorboard", "data.tokenizer=bpe", "data.vocabulary_size=300")
    result = run_on_text(tmp_path, *options)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (logged,) = events.Tensors("sample/text_summary")
    text = logged.tensor_proto.string_val[0].decode()
    lines = result["sample"].splitlines()
    assert [line.removeprefix("    ") for line in text.splitlines()] == lines
    assert logged.step == result["training"]["steps"] == 2
    tokenizer = tmp_path / "run" / "tokenizer.json"
    assert json.loads(tokenizer.read_text())["model"]["type"] == "BPE"
    memory = result["memory"]
    assert memory["tokenizer_bytes"] == tokenizer.stat().st_size
    assert memory["stored_bytes"] < memory["artifact_bytes"]  # neither has the tokenizer
    (counted,) = events.Scalars("memory/tokenizer_bytes")
    assert counted.value == memory["tokenizer_bytes"]
    printed = capsys.readouterr().out
    for order in (0, 4):
        shown = f"{result['references'][f'order-{order} counts']:.4g}"
        assert any(f"order-{order} counts" in row and shown in row for row in printed.splitlines())
    (row,) = [row for row in printed.splitlines() if "tokenizer bytes" in row]
    assert f"{memory['tokenizer_bytes']:,}" in row
    # No escape sequence of a model reaches the terminal.
    assert (
        "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in result["sample"])
        in printed
    )


def test_wandb_has_the_sample_as_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run_on_text(tmp_path, "logger=wandb")
    assert "tokenizer_bytes" not in result["memory"]
    (logged,) = offline_runs(tmp_path / "run")
    page = logged.file(logged.summary["sample/path"]).read_text()
    assert f"<pre>{html.escape(result['sample'])}</pre>" in page
