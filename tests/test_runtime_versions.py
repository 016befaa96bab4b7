"""One module of the runtime knows that versions of megatron-core differ."""

from __future__ import annotations

import ast
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from models import make_model, read_config

from transcoder.mesh import Mesh
from transcoder.runtime import specs
from transcoder.runtime.config import transformer_config
from transcoder.runtime.layers import HFRouter
from transcoder.runtime.model import build_model

RUNTIME = Path(specs.__file__).parent
TELLING = {"version", "__version__", "package_info", "is_te_min_version", "get_te_version"}


def words(path: Path) -> set[str]:
    """Every name that a module's code uses, and every word of its strings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {str(getattr(node, field)) for field in ("id", "attr", "name", "module") if hasattr(node, field)}
    return {part for name in found for part in name.split(".")}


def test_no_other_module_asks_for_the_version_or_for_the_kind_of_a_spec() -> None:
    modules = {path.name: words(path) for path in RUNTIME.glob("*.py")}
    assert len(modules) > 20 and "get_gpt_layer_local_spec" in modules["specs.py"]
    asking = {name: found & TELLING for name, found in modules.items() if found & TELLING}
    building = [name for name, found in modules.items() if "submodules" in found]
    assert not asking and building == ["specs.py"]


@pytest.mark.parametrize(
    "wrap", (lambda parts: SimpleNamespace(submodules=parts), lambda parts: partial(print, submodules=parts))
)
def test_both_spellings_of_a_spec_with_experts_take_our_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Any
) -> None:
    config = transformer_config(read_config(make_model("qwen3-moe", tmp_path / "moe")), Mesh())
    parts = SimpleNamespace(router=None)
    attention = SimpleNamespace(submodules=SimpleNamespace())
    layer = SimpleNamespace(submodules=SimpleNamespace(self_attention=attention, mlp=wrap(parts)))
    monkeypatch.setattr(specs, "get_gpt_layer_local_spec", lambda *_args, **_kwargs: layer)
    assert specs._local_layer(config, 8) is layer and parts.router is HFRouter


def test_the_installed_version_builds_our_router(tmp_path: Path) -> None:
    model = build_model(read_config(make_model("qwen3-moe", tmp_path / "moe")), Mesh())
    assert [type(layer.mlp.router) for layer in model.decoder.layers] == 4 * [HFRouter]
