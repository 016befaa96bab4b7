"""Imports point one way, and a conversion needs neither torch nor megatron nor transformers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from hf_models import make_model

import transcoder

ROOT = Path(transcoder.__file__).parent
HEAVY = {"torch", "megatron", "transformers", "ray", "accelerate"}
Graph = Mapping[str, set[str]]

REMOTE = {f"transcoder.remote.{name}" for name in ("errors", "files", "paths", "store")}  # paths of object stores
UPLOADS = "transcoder.remote.uploads"

# What a module may reach by any path of imports of our own, imports inside functions included.
FOUNDATION: dict[str, set[str]] = {
    "transcoder.errors": set(),
    "transcoder.spec": set(),
    "transcoder.notation": set(),
    "transcoder.layout": {"transcoder.notation"},
    "transcoder.moves": {"transcoder.layout", "transcoder.notation", "transcoder.spec"},
    "transcoder.mesh": {"transcoder.errors"},
    "transcoder.remote.store": set(),
    "transcoder.paths": {"transcoder.errors", *REMOTE},
    "transcoder.hfconfig": {"transcoder.errors", "transcoder.paths", "transcoder.disk", *REMOTE, UPLOADS},
    "transcoder.recipe": {"transcoder.layout", "transcoder.notation", "transcoder.errors"},
}
ABOVE_FORMATS = {"planner", "atlas", "checks", "engine", "importing", "exporting", "megatron", "api", "cli"}
ABOVE_RECIPES = ABOVE_FORMATS | {"formats", "dialects", "manifest"}
ABOVE_PLANNER = ABOVE_FORMATS - {"planner"} | {"formats", "manifest"}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name; links are followed."""
    found = {}
    for folder, _, files in os.walk(ROOT, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                parts = (Path(folder) / file).relative_to(ROOT).with_suffix("").parts
                found[".".join(("transcoder", *(part for part in parts if part != "__init__")))] = Path(folder) / file
    return found


MODULES = sources()


def imports(module: str, inside_functions: bool) -> set[str]:
    """Modules that a module imports at run time, its own parent packages apart."""
    tree = ast.parse(MODULES[module].read_text())
    return {name for node in statements(tree, inside_functions) for name in names_of(node) if name != module}


def statements(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Every statement that runs; what only type checkers see is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child, inside_functions)


def names_of(node: ast.AST) -> Iterator[str]:
    """The modules that one import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide what is imported"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in MODULES else str(node.module)


def graph(inside_functions: bool) -> dict[str, set[str]]:
    """Our modules and which of ours each imports."""
    return {module: imports(module, inside_functions) & set(MODULES) for module in MODULES}


def reached(edges: Graph, module: str) -> set[str]:
    """Everything that a module imports, at any distance; the package's own __init__ is not followed."""
    found: set[str] = set()
    open_ends = [module]
    while open_ends:
        for name in edges[open_ends.pop()] - found - {"transcoder"}:
            found.add(name)
            open_ends.append(name)
    return found


def cut(name: str) -> str:
    """The part of a module's name that the tables use."""
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("module", FOUNDATION)
def test_foundations_import_nothing_above_them(module: str) -> None:
    assert reached(graph(True), module) <= FOUNDATION[module]


@pytest.mark.parametrize(
    ("package", "above"), [("formats", ABOVE_FORMATS), ("recipes", ABOVE_RECIPES), ("planner", ABOVE_PLANNER)]
)
def test_lower_packages_never_reach_upper_ones(package: str, above: set[str]) -> None:
    edges = graph(True)
    members = [module for module in MODULES if cut(module) == package]
    found = {module: {name for name in reached(edges, module) if cut(name) in above} for module in members}
    assert members
    assert {module: names for module, names in found.items() if names} == {}


def test_no_modules_import_each_other_when_they_are_loaded() -> None:
    try:
        order = list(TopologicalSorter(graph(False)).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")
    assert set(order) == set(MODULES)


def test_only_the_command_line_and_the_package_itself_use_the_top() -> None:
    edges = graph(True)
    importers = {module for module, names in edges.items() if "transcoder.cli" in names}
    assert importers <= {"transcoder.__main__"}
    assert len(edges["transcoder.cli"]) > 1


def test_the_runtime_is_a_leaf_and_the_only_user_of_heavy_packages() -> None:
    edges = graph(True)
    runtime = {module for module in MODULES if cut(module) == "runtime"}
    assert len(runtime) > 1
    entries = {f"transcoder.{name}" for name in ("generate", "compare")}  # of torchrun -m
    assert {module for module in MODULES if edges[module] & runtime} <= runtime | entries | {"transcoder"}
    heavy = {module for module in MODULES if {name.split(".")[0] for name in imports(module, True)} & HEAVY}
    assert heavy <= runtime


CONVERSION = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
source, checkpoint, back = sys.argv[1:]
import transcoder
import transcoder.cli
transcoder.hf2mcore(source, checkpoint, tp=2, pp=2, sync=False)
transcoder.mcore2hf(checkpoint, back, sync=False)
transcoder.verify(source, checkpoint)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "megatron", "transformers", "tensorflow", "jax"}))
"""


def test_a_conversion_both_ways_imports_no_heavy_package(tmp_path: Path) -> None:
    source = make_model("qwen2", tmp_path / "source")
    command = [sys.executable, "-c", CONVERSION, source, tmp_path / "mcore", tmp_path / "back"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    for path in source.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("package", ["torch", "megatron.core", "transformers"])
def test_the_guard_of_the_conversion_test_would_notice(package: str) -> None:
    script = CONVERSION.replace("import transcoder\n", f"import {package}\n", 1)
    command = [sys.executable, "-c", script, "a", "b", "c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"RuntimeError: {package.split('.')[0]} is imported" in done.stderr


COMMAND = """
import sys
from transcoder.cli import main
sys.argv = ["transcode", *sys.argv[1:]]
try:
    main()
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
LATE = {"numpy", "yaml", "hashlib", "concurrent.futures", "jsonschema", "asyncio", "transcoder.engine"}


@pytest.mark.parametrize(
    ("arguments", "status", "more"),
    [
        (["--help"], 0, {"transcoder.importing", "transcoder.planner", "isal", "xxhash"}),
        (["plan", "--no-such-option"], 2, {"transcoder.importing", "transcoder.planner", "isal", "xxhash"}),
        (["plan", "{source}", "--tp", "2"], 0, {"xxhash", "transcoder.manifest", "transcoder.megatron"}),
        (["plan", "{source}", "--tp", "7"], 2, {"xxhash", "transcoder.manifest", "transcoder.megatron"}),
        (["inspect", "{source}"], 0, {"transcoder.importing", "transcoder.planner", "xxhash"}),
        (["inspect", "{checkpoint}"], 0, {"transcoder.importing", "transcoder.planner", "xxhash"}),
        (["plan", "{checkpoint}"], 0, set()),
        (["inspect", "{nothing}"], 3, {"transcoder.importing", "transcoder.planner", "xxhash"}),
    ],
)
def test_commands_that_need_no_bytes_import_nothing_that_moves_them(
    arguments: list[str], status: int, more: set[str], tmp_path: Path
) -> None:
    source, checkpoint = make_model("qwen2", tmp_path / "source"), tmp_path / "checkpoint"
    if "{checkpoint}" in arguments:
        transcoder.hf2mcore(source, checkpoint, sync=False)
    places = {"source": source, "checkpoint": checkpoint, "nothing": tmp_path / "nothing"}
    command = [sys.executable, "-c", COMMAND, *(text.format_map(places) for text in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert {"transcoder.cli", "click"} <= loaded
    assert not loaded & (LATE | more)
