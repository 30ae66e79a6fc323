"""Promises about the repository itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "memfold").rglob("*.py"))
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").rglob("*.md")]
)

# Folder or file -> top-level packages that it must not import: dependencies point one way.
FORBIDDEN = {
    "strategies": {"lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "backbones": {"lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "memory.py": {"lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "artifact.py": {"lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "artifact_file.py": {"lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "files.py": {"torch", "lightning", "hydra", "omegaconf", "wandb", "sklearn"},
    "data": {"hydra", "omegaconf", "wandb"},
    "tasks": {"hydra", "omegaconf", "wandb"},
    "reporting": {"torch", "lightning", "hydra", "omegaconf", "sklearn"},
}


def imported_packages(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    top = path.relative_to(ROOT / "src" / "memfold").parts[0]
    assert not imported_packages(path) & FORBIDDEN.get(top, set())


def test_importing_memfold_loads_nothing_heavy_but_torch():
    code = "import sys, memfold; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in loaded
    assert not {"lightning", "hydra", "omegaconf", "wandb", "sklearn", "matplotlib"} & set(loaded)


def text_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_whole(page):
    for table in re.findall(r"(?:^ *\|.*\n?)+", text_of(page), flags=re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", row.strip())[1:-1] for row in table.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, rows[0]
        rule = rows[1:2]
        assert rule, f"only one row: {rows[0]}"
        assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in rule[0]), f"header of {rows[0]}"
