"""Every public name is explained, and every name that the package promises is there."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import transcoder
from transcoder import DifferenceError, InputError, OutputError, TranscoderError, UsageError

ROOT = Path(transcoder.__file__).parent
FILES = sorted(
    Path(folder) / file
    for folder, _, files in os.walk(ROOT, followlinks=True)
    for file in files
    if file.endswith(".py") and Path(folder).name != "runtime"
)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_and_class_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = [name for name, node in public(tree.body) if not (ast.get_docstring(node) or "").strip()]
    assert missing == []
    assert ast.get_docstring(tree) or not tree.body


def test_the_search_for_docstrings_sees_methods_and_skips_private_names() -> None:
    tree = ast.parse("class A:\n def b(self): 'x'\n def _c(self): 0\n\ndef d(): 0\n\ndef _e(): 0")
    assert [name for name, _ in public(tree.body)] == ["A", "A.b", "d"]
    assert len(FILES) > 20


@pytest.mark.parametrize("name", transcoder.__all__)
def test_every_promised_name_resolves(name: str) -> None:
    found = getattr(transcoder, name)
    assert callable(found)
    assert found.__doc__
    assert found.__module__.startswith("transcoder.")


def test_the_promised_names_hold_the_conversions_and_the_errors_once_each() -> None:
    names = list(transcoder.__all__)
    assert len(set(names)) == len(names)
    assert {"hf2mcore", "mcore2hf", "stream_hf", "TranscoderError", "InputError", "UsageError"} <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        transcoder.no_such_name  # noqa: B018


def test_no_module_has_the_name_of_a_function() -> None:
    modules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert modules & set(transcoder.__all__) == set()
    assert "errors" in modules


@pytest.mark.parametrize(
    ("error", "code", "base"),
    [
        (TranscoderError, 1, Exception),
        (UsageError, 2, ValueError),
        (InputError, 3, ValueError),
        (OutputError, 4, OSError),
        (DifferenceError, 5, TranscoderError),
    ],
)
def test_an_error_class_has_the_exit_status_of_the_contract(error: type, code: int, base: type) -> None:
    raised = error("text", kind="kind")
    assert isinstance(raised, base) and isinstance(raised, TranscoderError)
    assert (raised.exit_code, raised.kind, raised.problems, str(raised)) == (code, "kind", (), "text")
    assert raised.as_json() == {"code": code, "kind": "kind", "message": "text", "problems": []}
