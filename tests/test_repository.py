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

LIBRARIES = {"torch", "lightning", "hydra", "omegaconf", "wandb", "sklearn"}
SMALL = {"errors", "file_lock", "files", "importing", "options", "seeding"}
# Room: a folder or file of memfold -> other rooms that it may import, and libraries that it must
# not. Dependencies point one way.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), LIBRARIES),
    "file_lock": (set(), LIBRARIES),
    "files": ({"errors"}, LIBRARIES),
    "importing": ({"errors"}, LIBRARIES),
    "options": ({"errors"}, LIBRARIES),
    "seeding": (set(), LIBRARIES),
    "entropy_coding": ({"errors"}, LIBRARIES - {"torch"}),
    "quantisation": (SMALL | {"entropy_coding"}, LIBRARIES - {"torch"}),
    "file_format": ({"errors", "files"}, LIBRARIES - {"torch"}),
    "compression": (SMALL | {"file_format", "quantisation"}, LIBRARIES - {"torch"}),
    "strategies": (
        SMALL | {"entropy_coding", "quantisation", "compression"},
        LIBRARIES - {"torch"},
    ),
    "memory": ({"compression"}, LIBRARIES - {"torch"}),
    "operations": (set(), LIBRARIES - {"torch"}),
    "artifact_file": (SMALL | {"compression", "file_format"}, LIBRARIES - {"torch"}),
    "artifact": (
        SMALL | {"artifact_file", "compression", "quantisation", "strategies"},
        LIBRARIES - {"torch"},
    ),
    "__init__": (
        {"artifact", "compression", "errors", "memory", "strategies"},
        LIBRARIES - {"torch"},
    ),
    "backbones": (SMALL | {"data"}, LIBRARIES - {"torch"}),
    "data": (SMALL, {"hydra", "omegaconf", "wandb"}),
    "tasks": (SMALL | {"compression", "data", "processes"}, {"hydra", "omegaconf", "wandb"}),
    "overrides": (SMALL, LIBRARIES - {"hydra", "omegaconf"}),
    "processes": (SMALL | {"overrides"}, {"torch", "omegaconf", "wandb", "sklearn"}),
    "file_models": (SMALL, LIBRARIES),
    "runs": (
        SMALL | {"file_models", "overrides", "processes"},
        {"torch", "lightning", "wandb", "sklearn"},
    ),
    "logging": (
        SMALL | {"compression", "memory", "processes", "runs"},
        {"hydra", "omegaconf", "sklearn"},
    ),
    "training": (
        SMALL
        | {"backbones", "compression", "data", "logging", "memory", "operations"}
        | {"overrides", "processes", "runs", "strategies", "tasks"},
        {"sklearn"},
    ),
    "studies": (
        SMALL
        | {
            "file_models",
            "compression",
            "data",
            "overrides",
            "processes",
            "runs",
            "strategies",
            "tasks",
            "training",
        },
        {"wandb", "sklearn"},
    ),
    "train_command": (SMALL | {"processes", "runs", "studies", "training"}, {"torch", "lightning"}),
    "benchmarking": (
        SMALL | {"backbones", "compression", "memory", "runs", "strategies"},
        {"lightning", "hydra", "omegaconf", "wandb"},
    ),
    "reporting": (
        SMALL | {"file_models", "logging", "runs", "strategies"},
        LIBRARIES - {"wandb"},
    ),
}


def test_the_picture_of_the_house_has_every_room_below_those_that_it_imports():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (picture,) = re.findall(r"^src/memfold/\n(.*?)^scripts/", page, re.MULTILINE | re.DOTALL)
    rooms = [
        room.removesuffix("/").removesuffix(".py")
        for line in picture.splitlines()
        for room in line.strip().partition("  ")[0].split()
    ]
    assert sorted(rooms) == sorted(ROOMS.keys() - {"__init__"})
    for number, room in enumerate(rooms):
        assert ROOMS[room][0] <= {*rooms[:number]}, room


def imported_modules(path):
    """Yield the dotted names of all modules, or names in packages, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    room = path.relative_to(ROOT / "src" / "memfold").parts[0].removesuffix(".py")
    rooms, libraries = ROOMS[room]
    parts = [name.split(".") for name in imported_modules(path)]
    inside = {name[1] for name in parts if name[0] == "memfold" and len(name) > 1}
    assert inside & ROOMS.keys() <= rooms | {room}
    assert not {name[0] for name in parts} & libraries


def test_the_products_have_one_door():
    door = "memfold.strategies.sharing.products"
    found = {
        (path.parent.name, name.removeprefix(door).split(".")[1])
        for path in SOURCES
        for name in imported_modules(path)
        if name.startswith(f"{door}.")
    }
    inside = {path.stem for path in (ROOT / "src" / door.replace(".", "/")).glob("*.py")}
    assert {name for room, name in found if room != "products"} & inside == set()


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("fcntl", {"file_lock.py"}),
        # Beside studies: the processes of a benchmark, and Git's words on the commit.
        (
            "subprocess",
            {
                "benchmarking/case_process.py",
                "runs/result.py",
                "studies/process.py",
            },
        ),
    ],
)
def test_one_file_locks_and_one_starts_trainings(library, files):
    found = {
        path.relative_to(ROOT / "src" / "memfold").as_posix()
        for path in SOURCES
        if any(library in name.split(".") for name in imported_modules(path))
    }
    assert found <= files


def private_names(path):
    """Yield the private names that a file uses and does not define itself."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    fields = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {
        field.attr
        for field in fields
        if isinstance(field.ctx, ast.Store) and ast.unparse(field.value) == "self"
    }
    imported = [name for module in imported_modules(path) for name in module.split(".")]
    used = {field.attr for field in fields if ast.unparse(field) != "os._exit"}
    yield from (name for name in {*used, *imported} - own if re.match("_[^_]", name))


def test_one_file_knows_the_private_names_of_lightning():
    rooms = {room for room, (_, libraries) in ROOMS.items() if "lightning" not in libraries}
    found = {
        path.relative_to(ROOT / "src" / "memfold").as_posix(): sorted(private_names(path))
        for path in SOURCES
        if path.relative_to(ROOT / "src" / "memfold").parts[0].removesuffix(".py") in rooms
    }
    found = {path: names for path, names in found.items() if names}
    assert found.pop("processes/lightning_internals.py")
    assert found == {"studies/sweep_plan.py": ["_internal"]}  # of Hydra


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
