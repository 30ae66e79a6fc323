"""The W&B workspace: written without a key, the same when it is read back, published with one."""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import wandb

from memfold.reporting.wandb_dashboard import main
from wandb_processes import forget_wandb

# wandb-workspaces declares models in pydantic's old way; the warning comes with its import.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

PROJECT = ("--entity", "me", "--project", "memfold")


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_wandb(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


def definition(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def panels(content: dict[str, Any]) -> list[dict[str, Any]]:
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def run_set(content: dict[str, Any]) -> dict[str, Any]:
    [one] = content["spec"]["section"]["runSets"]
    return one


def filters(content: dict[str, Any]) -> set[tuple[str, str, str]]:
    found = run_set(content)["filters"]["filters"]
    return {(one["key"]["name"], one["op"], str(one["value"])) for one in found}


def test_without_a_key_a_file_is_written_and_one_line_says_how_to_publish_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with space" / "board.json"
    assert main([*PROJECT, "--out", str(out)]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "W&B has no key here" in line
    command = shlex.split(line.rpartition(": ")[2])
    assert command == ["python", "scripts/wandb_dashboard.py", "--from", str(out)]
    content = definition(out)
    assert (content["entity"], content["project"]) == ("me", "memfold")


def test_it_shows_what_a_comparison_needs(tmp_path: Path) -> None:
    assert main([*PROJECT, "--out", "board.json"]) == 0
    content = definition(tmp_path / "board.json")
    shown = [(panel["viewType"], panel["config"]) for panel in panels(content)]
    planes = [c for kind, c in shown if kind == "Scatter Plot"]
    costs = ("memory/stored_bytes", "ratio", "memory/peak_bytes", "time/fit_seconds")
    costs += ("training/rounds", "compute/operations")
    metrics = ("accuracy", "bpb", "rmse")
    assert all(c["xAxisLogScale"] for c in planes)
    assert [(c["yAxis"], c["xAxis"]) for c in planes] == [
        (f"summary:{metric}", f"summary:{cost}") for metric in metrics for cost in costs
    ]
    bars = {metric for kind, c in shown if kind == "Bar Chart" for metric in c["metrics"]}
    assert {*metrics, "memory/stored_bytes", "memory/peak_bytes"} <= bars
    lines = [c for kind, c in shown if kind == "Run History Line Plot"]
    assert {c["xAxis"] for c in lines} == {"trainer/global_step"}
    assert {(*c["metrics"], c["groupBy"]) for c in lines} >= {
        *((f"val/{name}", "strategy.value") for name in ("acc", "bpb", "rmse")),
        ("train/loss", "setting.value"),
    }
    runs = run_set(content)
    assert [key["name"] for key in runs["grouping"]] == ["strategy.value", "setting.value"]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[:2] == ["run:displayName", "config:method.value"]
    assert {"summary:accuracy", "summary:val/best_bpb", "config:seed.value"} <= set(columns)
    colours = content["spec"]["section"]["customRunColors"]
    assert "#0072B2" in [colour for key, colour in colours.items() if "stable_rps" in key]


def test_runs_are_chosen_by_group_data_and_backbone(tmp_path: Path) -> None:
    assert main([*PROJECT, "--out", "all.json"]) == 0
    plain = filters(definition(tmp_path / "all.json"))
    assert plain == {("state", "=", "finished"), ("jobType", "!=", "tune")}
    chosen = ("--group", "first sweep", "second", "--data", "digits", "--backbone", "mlp")
    assert main([*PROJECT, *chosen, "--out", "some.json"]) == 0
    assert filters(definition(tmp_path / "some.json")) - plain == {
        ("group", "IN", "['first sweep', 'second']"),
        ("data", "=", "digits"),
        ("backbone", "=", "mlp"),
    }


def test_a_file_is_read_back_as_it_was_and_may_change_its_project(tmp_path: Path) -> None:
    assert main([*PROJECT, "--group", "first", "--name", "Mine", "--out", "first.json"]) == 0
    assert main(["--from", "first.json", "--out", "same.json"]) == 0
    assert main(["--from", "first.json", "--project", "other", "--out", "other.json"]) == 0
    first = definition(tmp_path / "first.json")
    assert first["displayName"] == "Mine"
    assert definition(tmp_path / "same.json") == first
    assert definition(tmp_path / "other.json") == {**first, "project": "other"}


def sent_views(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[Any]:
    """Stand in for the server, which takes views or raises `error`."""
    from wandb_workspaces.workspaces import internal
    from wandb_workspaces.workspaces.interface import Workspace

    views: list[Any] = []

    def upsert(view: Any) -> dict[str, Any]:
        if error is not None:
            raise error
        views.append(view)
        return {"upsertView": {"view": {"id": "1", "name": view.name}}}

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr(Workspace, "url", "https://wandb.ai/me/memfold?nw=1")
    wandb.teardown()
    return views


def test_with_a_key_the_same_definition_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PROJECT, "--out", "board.json"]) == 0
    views = sent_views(monkeypatch)
    assert main(["--from", "board.json"]) == 0
    [view] = views
    sent = json.loads(view.model_dump_json(by_alias=True, exclude_none=True))
    assert sent["spec"] == definition(tmp_path / "board.json")["spec"]
    assert view.name.startswith("nw-")
    assert "saved: https://wandb.ai/me/memfold?nw=1" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main([*PROJECT, "--out", "again.json"]) == 0
    assert len(views) == 1
    assert (tmp_path / "again.json").exists()


def test_what_the_server_refuses_is_kept_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent_views(monkeypatch, wandb.errors.CommError("no route\nto host"))
    assert main(PROJECT) == 1
    said = capsys.readouterr()
    assert said.err == "error: W&B did not take the workspace: no route to host\n"
    assert "wrote wandb_dashboard.json" in said.out
    assert definition(tmp_path / "wandb_dashboard.json")["entity"] == "me"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--entity and --project are needed"),
        (["--entity", "a/b", "--project", "p"], "--entity must be a name, got 'a/b'"),
        (["--entity", "e", "--project", " "], "--project must be a name, got ' '"),
        (["--from", "missing.json"], "--from missing.json: No such file"),
        (["--from", "broken.json"], "--from broken.json is no workspace"),
        (["--from", "other.json"], "--from other.json is no workspace"),
        (["--from", "other.json", "--group", "a"], "not --group"),
        ([*PROJECT, "--out", "broken.json/x"], "cannot write broken.json/x"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.json").write_text('{"entity": "me"')
    (tmp_path / "other.json").write_text("[1]")
    assert main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(PROJECT) == 1
    assert capsys.readouterr().err == (
        "error: the dashboard needs the extra wandb: pip install -c constraints.txt -e '.[wandb]'\n"
    )
