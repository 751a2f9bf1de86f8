"""The plan of the house: imports go down its floors, and what the guides name is there."""

import ast
import importlib
import re
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import blockffn_mlx
from blockffn_mlx.moved import MOVED

ROOT = Path(__file__).parents[1]
# Rooms below blockffn_mlx by floor, the lowest first; rooms of one floor do not know each other.
FLOORS = [
    {"version", "device", "quantisation", "arrays", "paths", "pace"},
    {"kernels"},
    {"ffn"},
    {"models"},
    {"checkpoints"},
    {"speculative"},
    {"prompt"},
    {"generate", "batch"},
    {"chat", "analysis", "training"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = [("device", "version")]  # may import in this direction
# The front door, the line that converted folders import, former names, and the kernels' source.
ABOVE = {"__init__", "__main__", "model", "moved", "metal"}
MODULES = [
    path
    for folder in ("blockffn_mlx", "cli", "metal")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents) and path.parent.name != "demo"
]


def dotted(path: Path) -> list[str]:
    """A file's name below blockffn_mlx, as Python imports it."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[1:] if parts[0] == "blockffn_mlx" else parts


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, inside functions too, and the third parties by name."""
    found, package = set(), dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {f"!{alias.name.split('.')[0]}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            first, *rest = (node.module or "").split(".")
            found.add(rest[0] if first == "blockffn_mlx" and rest else f"!{first}")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = base + (node.module.split(".") if node.module else [])
            found |= {target[0]} if target else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(dotted(path)))
def test_imports_go_down(path):
    room = dotted(path)[0]
    if room in ABOVE:
        return
    below = {name for name in FLOOR if FLOOR[name] < FLOOR[room]} | {room}
    below |= {to for start, to in SAME_FLOOR if start == room}
    below |= {"__version__", "require_backend", "keep_file_limit"}  # of the package itself
    rooms = {name for name in imported(path) if not name.startswith("!")}
    assert rooms <= below, f"{path.name} of {room} imports {sorted(rooms - below)}"


def test_every_module_has_a_room():
    assert {dotted(path)[0] for path in MODULES} - ABOVE <= set(FLOOR)


def test_every_kernel_is_on_its_page():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert [p.name for p in (ROOT / "metal").glob("*.metal") if p.name not in page] == []


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["parquet"]
    names = {re.split(r"[>\[]", text)[0] for text in wanted}
    declared = {name.lower().replace("-", "_") for name in names}
    declared |= {"markdown_it"} if "markdown_it_py" in declared else set()
    third = {name[1:] for path in MODULES for name in imported(path) if name.startswith("!")}
    missing = {
        name
        for name in third - set(sys.stdlib_module_names) - {"blockffn_mlx"}
        if name.lower() not in declared
    }
    assert not missing


PAGES = ["CONTRIBUTING.md", "README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_guides_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:blockffn_mlx|cli|metal|tests|docs|examples|bench)/[\w./-]*)`", text)
    named += re.findall(r"\]\(((?!http)[\w./-]+)\)", text)
    folder = (ROOT / page).parent
    missing = {
        name
        for name in named
        if "NAME" not in name and not (ROOT / name).exists() and not (folder / name).exists()
    }
    assert not missing


def test_each_task_names_at_most_four_places():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tasks = text.split("## Where to touch what")[1].split("\n## ")[0].split("\n### ")[1:]
    assert len(tasks) >= 5
    for task in tasks:
        assert 1 <= len(re.findall(r"^\d\. ", task, re.M)) <= 4, task.splitlines()[0]


@pytest.mark.parametrize("name", sorted(MOVED))
def test_former_names_give_the_module_that_took_their_place(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        former = importlib.import_module(f"blockffn_mlx.{name}")
    assert former is importlib.import_module(f"blockffn_mlx.{MOVED[name]}")
    assert not (ROOT / "blockffn_mlx" / f"{name}.py").exists()


def test_public_functions_stay_functions_beside_former_modules():
    for name in ("load", "convert", "sparsity", "generate"):
        assert callable(getattr(blockffn_mlx, name))
    assert callable(blockffn_mlx.checkpoint.load_checkpoint)
