import pytest
from rich.console import Console

from memfold.benchmarking.cases import Case
from memfold.benchmarking.plots import draw
from memfold.benchmarking.results import by_group, describe_machine, read_results, summarise
from memfold.benchmarking.tables import print_tables, to_markdown
from memfold.errors import InputError

DENSE = Case(model="mlp_tiny", batch_size=4, threads=1)
METRICS = (
    "construction_seconds",
    "step_seconds",
    "samples_per_second",
    "latency_1_seconds",
    "latency_batch_seconds",
)
BYTES = (
    "peak_bytes",
    "train_state_bytes",
    "saved_bytes",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "grad_sync_bytes",
    "artifact_bytes",
)


def shared(ratio, **fields):
    given = {"strategy": "stable_rps", "ratio": ratio, **fields}
    return Case(**{**DENSE.to_dict(), **given})


def measurement(seconds, size):
    return {
        **dict.fromkeys(METRICS, seconds),
        **dict.fromkeys(BYTES, size),
        "steps": [seconds, seconds],
    }


def results():
    entries = []
    for optimizer in ("sgd", "adamw"):
        dense = [measurement(0.1, 4_000_000)] * 2
        small = [measurement(0.15, 400_000), measurement(0.2, 400_000)]
        for case, found in (
            (Case(**{**DENSE.to_dict(), "optimizer": optimizer}), dense),
            (shared(0.1, optimizer=optimizer), small),
            (shared(0.01, optimizer=optimizer), small),
            (shared(0.1, optimizer=optimizer, options={"sign": "weight"}), small),
            (shared(0.5, optimizer=optimizer), [{"error": "MemoryError: no more"}]),
        ):
            entries.append(summarise(case, found, dense))
    machine = describe_machine("cpu", 1)
    return {"command": "python x", "rounds": 2, "environment": machine, "cases": entries}


def test_ratios_are_taken_within_each_round():
    dense = [{"step_seconds": s, "saved_bytes": 0, "steps": [s]} for s in (1.0, 2.0, 4.0)]
    found = [{"step_seconds": s, "saved_bytes": 8, "steps": [s]} for s in (2.0, 6.0, 4.0)]
    entry = summarise(shared(0.1), found, dense)
    assert entry["status"] == "completed"
    assert entry["measured"]["step_seconds"] == {"median": 4.0, "min": 2.0, "max": 6.0}
    # 2, 3 and 1: neither the ratio of the medians (2.0 too) nor its spread.
    assert entry["relative"]["step_seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert "saved_bytes" not in entry["relative"]  # nothing to divide by
    assert entry["rounds"] == found


def test_the_densified_model_is_compared_with_the_dense_one():
    dense = [{"latency_1_seconds": 2.0, "steps": []}]
    found = [{"latency_1_seconds": 8.0, "densified_latency_1_seconds": 3.0, "steps": []}]
    relative = summarise(shared(0.1), found, dense)["relative"]
    assert relative["densified_latency_1_seconds"]["median"] == 1.5
    assert relative["latency_1_seconds"]["median"] == 4.0


def test_failures_are_kept_with_what_was_measured_before():
    entry = summarise(shared(0.1), [{"step_seconds": 1.0, "steps": []}, {"error": "no"}], [])
    assert (entry["status"], entry["error"]) == ("failed", "no")
    assert entry["measured"] == entry["relative"] == {}
    assert len(entry["rounds"]) == 1


def test_without_a_dense_case_there_are_no_ratios():
    found = [{"step_seconds": 1.0, "steps": []}]
    entry = summarise(shared(0.1), found, [{"error": "no"}])
    assert entry["status"] == "completed"
    assert entry["measured"]["step_seconds"]["median"] == 1.0
    assert entry["relative"] == {}


def test_the_tables_show_numbers_ratios_and_failures():
    text = to_markdown(results())
    assert "## mlp_tiny, batch 4, sgd, float32, eager, cpu, 1 threads" in text
    assert "| stable_rps 0.1 | 175 (150-200) | 1.75 (1.50-2.00) |" in text
    assert "| stable_rps 0.01 | 400 kB (0.10 x) |" in text
    assert "| dense | 4 MB (1.00 x) |" in text
    assert "failed: stable_rps 0.5: MemoryError: no more" in text
    assert f"- torch: {results()['environment']['torch']}" in text


def test_there_is_no_table_of_nothing():
    failed = [summarise(DENSE, [{"error": "no"}], [{"error": "no"}])]
    text = to_markdown({**results(), "cases": failed})
    assert "failed: dense: no" in text
    assert "|" not in text


def test_the_screen_shows_every_case(capsys):
    print_tables(results(), Console(width=120))
    shown = capsys.readouterr().out
    assert "stable_rps 0.1 sign=weight" in shown
    assert "failed: stable_rps 0.5: MemoryError: no more" in shown


def test_pictures_are_a_function_of_the_results(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        names = {path.name for path in draw(results(), folder)}
        stems = ("step_time", "latency_batch_1", "latency_large_batch", "memory")
        assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
    text = (folders[0] / "step_time.svg").read_text()
    assert "mlp_tiny, sgd" in text
    assert "mlp_tiny, adamw" in text
    assert "stable_rps sign=weight" in text
    assert "saved for backward" in (folders[0] / "memory.svg").read_text()


def test_there_is_no_picture_of_nothing(tmp_path):
    failed = [summarise(DENSE, [{"error": "no"}], [{"error": "no"}])]
    assert draw({"cases": failed}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_groups_keep_their_order():
    groups = by_group(results())
    assert [len(entries) for _, entries in groups] == [5, 5]
    assert all(entries[0]["name"] == "dense" for _, entries in groups)


def test_the_machine_is_described():
    machine = describe_machine("cpu", 3)
    assert machine["threads"] == 3
    assert machine["gpu"] is None
    assert {"cpu", "memory_bytes", "os", "python", "torch", "git_commit"} <= machine.keys()


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        read_results(file)
