"""What PyTorch's, Lightning's, Hydra's and W&B's defaults get wrong: every row has its tests."""

import ast
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from memfold.errors import InputError
from memfold.processes.ranks import LAUNCHER_VARIABLES
from memfold.training import run
from memfold.training.instantiate import instantiate
from training.jobs import SMALL, compose_job

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pitfalls.md"
SOURCES = [ROOT / "train.py", *sorted((ROOT / "src").rglob("*.py"))]
SOURCES += sorted((ROOT / "scripts").glob("*.py"))


def rows() -> list[list[str]]:
    """Cells of every row of the page's tables, without the headings."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("goes wrong", "---")]


def named_tests(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)


def functions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 3, row
        found = named_tests(row[2])
        assert found, row
        for path, name in found:
            assert name in functions(ROOT / path), f"{path}::{name}"


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_objects_are_made_from_the_configuration_in_one_place() -> None:
    """A change of Hydra's rules about targets is a change of one module."""
    makers = {path.name for path in SOURCES if "hydra.utils.instantiate" in calls(path)}
    assert makers == {"instantiate.py"}
    others = [path for path in SOURCES if path.name != "instantiate.py"]
    for path in others:
        assert "hydra.utils import instantiate" not in path.read_text(), path


@pytest.mark.parametrize("target", ["shutil.rmtree", "builtins.eval", "os.remove"])
def test_dangerous_targets_are_refused_in_one_line(target: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(InputError) as error:
        instantiate({"_target_": target, "_args_": [str(tmp_path)]}, "backbone")
    assert str(error.value).startswith("backbone: ")
    assert "\n" not in str(error.value)
    assert (tmp_path / "kept").exists()


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {parsed.name: parsed for parsed in map(Requirement, chain.from_iterable(groups))}


@pytest.mark.parametrize(
    ("package", "tested", "coming"),
    [
        ("hydra-core", "1.3.8", "1.4.0"),
        ("wandb", "0.31.0", "0.32.0"),
        ("lightning", "2.6.6", "2.7.0"),
    ],
)
def test_untested_versions_are_kept_out(package: str, tested: str, coming: str) -> None:
    allowed = requirements()[package].specifier
    assert tested in allowed
    assert coming not in allowed


def test_packages_that_break_others_are_no_dependencies() -> None:
    """A CPU torchvision breaks Lightning's import; Hydra's sweeper holds Optuna at 2.10."""
    names = {name.lower() for name in requirements()}
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    for package in ("torchvision", "hydra-optuna-sweeper", "hydra-colorlog"):
        assert package not in names | pinned
    assert "4.0.0" in requirements()["optuna"].specifier
    assert "2.10.1" not in requirements()["optuna"].specifier


def test_torchvision_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning imports torchmetrics, which imports torchvision wherever it finds one."""
    broken = tmp_path / "packages" / "torchvision"
    broken.mkdir(parents=True)
    message = "operator torchvision::nms does not exist"
    (broken / "__init__.py").write_text(f"raise RuntimeError({message!r})")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, f"hydra.run.dir='{tmp_path / 'run'}'"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the torchvision that is installed does not fit")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_configuration_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`conf/` is no part of the package: it lies beside `train.py`, wherever one stands."""
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "compression:" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_no_process_group_and_prints_no_advertisement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.INFO)  # as the libraries come
    groups = []
    initialise = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: groups.append(initialise(*a, **k))
    )
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    one_rank = ["trainer=ddp_cpu", "trainer.devices=1", "debug=fast"]
    overrides = [text for text in SMALL if text != "trainer=cpu"]
    assert run(compose_job(tmp_path, *overrides, *one_rank))["status"] == "completed"
    assert groups
    assert not torch.distributed.is_initialized()
    printed = "".join(capfd.readouterr())
    assert "completed" in printed or "stored" in printed
    assert "Tip" not in printed
