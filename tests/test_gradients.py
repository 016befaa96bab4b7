"""Gradients that both sides log agree module for module, in one process and in several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from command_line import EXAMPLE
from generating import torchrun

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker
from models import make_model

from transcoder import UsageError
from transcoder.runtime.device import shutdown

Records = list[dict[str, Any]]
Numbers = dict[str, float]
ROW = "r"
# A module of Megatron's layer and the modules that hold the same in Hugging Face's; where tensor-parallel ranks have
# parts: of the output (o), of the weight (w), of the weight but not of the bias (r).
LAYER = (
    ("", ("",), ""),
    (".input_layernorm", (".input_layernorm",), ""),
    (".self_attention.linear_qkv", (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"), "ow"),
    (".self_attention.q_layernorm", (".self_attn.q_norm",), "o"),
    (".self_attention.k_layernorm", (".self_attn.k_norm",), "o"),
    (".self_attention.linear_proj", (".self_attn.o_proj",), "wr"),
    (".pre_mlp_layernorm", (".post_attention_layernorm",), ""),
    (".mlp.linear_fc1", (".mlp.gate_proj", ".mlp.up_proj"), "ow"),
    (".mlp.linear_fc2", (".mlp.down_proj",), "wr"),
)
CASES: list[tuple[str, dict[str, int]]] = [
    ("llama", {"tp": 2}),
    ("llama-groups", {"tp": 2}),  # fewer groups than ranks
    ("llama-bias", {"tp": 2}),
    ("qwen2", {"tp": 2}),
    ("qwen3", {"tp": 2}),
    ("olmoe", {"tp": 2}),
    ("qwen2-moe", {"tp": 2}),
    ("llama-tied", {"pp": 2}),
]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


def pairs(layers: int) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Every module of a model with its counterparts."""
    for number in range(layers):
        for ours, theirs, parts in LAYER:
            yield f"decoder.layers.{number}{ours}", tuple(f"model.layers.{number}{name}" for name in theirs), parts
    yield "embedding.word_embeddings", ("model.embed_tokens",), "w"
    yield "decoder.final_layernorm", ("model.norm",), ""
    yield "output_layer", ("lm_head",), "w"


def statistics(records: Records, what: str) -> dict[str, list[Numbers]]:
    """What was logged of a module's output, or of its `weight` or `bias`, by each rank that did."""
    found: dict[str, list[Numbers]] = {}
    for record in records:
        for each in record.get(what, ()):
            name = f"{record['module']}.{each['name']}" if what == "weight_gradients" else record["module"]
            if "min" in each:  # some experts have no tokens
                found.setdefault(name, []).append({key: each[key] for key in ("min", "max", "abs_sum")})
    return found


def joined(parts: Sequence[Numbers]) -> Numbers:
    """Of several tensors together."""
    return {
        "min": min(part["min"] for part in parts),
        "max": max(part["max"] for part in parts),
        "abs_sum": sum(part["abs_sum"] for part in parts),
    }


def assert_agreement(hf: Records, megatron: Records) -> int:
    """Compare whatever both sides have; how many tensors that were."""
    compared = 0
    for what, suffixes in (("output_gradients", ("",)), ("weight_gradients", (".weight", ".bias"))):
        theirs, ours = statistics(hf, what), statistics(megatron, what)
        for suffix, (module, names, parts) in product(suffixes, pairs(4)):
            if f"{module}{suffix}" in ours and all(f"{name}{suffix}" in theirs for name in names):
                want = joined([theirs[f"{name}{suffix}"][0] for name in names])
                mine, in_parts = (
                    ours[f"{module}{suffix}"],
                    what[0] in parts and not (suffix == ".bias" and ROW in parts),
                )
                for found in [joined(mine)] if in_parts else mine:
                    assert found == pytest.approx(want, rel=2e-4, abs=1e-7), (what, module)
                compared += 1
    return compared


def test_gradients_agree_at_two_processes(tmp_path: Path) -> None:
    small: dict[str, dict[str, int]] = {"llama-groups": {"num_key_value_heads": 1}}
    folders = {kind: make_model(kind, tmp_path / kind, num_hidden_layers=2, **small.get(kind, {})) for kind, _ in CASES}
    cases: list[dict[str, Any]] = [{"hf": str(folders[kind]), "backward": True, **grid} for kind, grid in CASES]
    cases[-1]["command"] = [
        "--hf_model_path", str(EXAMPLE), "--prompt", "The assert statement", "--tp", "2", "--backward",
        "--log-dir", str(tmp_path / "logs"),
    ]  # fmt: skip
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    status, out, err = torchrun(2, str(Path(worker.__file__)), str(path))
    assert status == 0, f"{out}\n{err[-6000:]}"
    counts = [assert_agreement(**found) for found in json.loads(Path(f"{path}.out").read_text())]
    assert min(counts) > 20, counts
    logs = [tmp_path / "logs" / f"debug_bwd_log_2_rank_{rank}.jsonl" for rank in range(2)]
    records = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert [each["place"]["tp"] for part in records for each in part if each["module"] == "output_layer"]
    hf = [each for each in records[0] if each["model"] == "hf"]
    ours = [each for part in records for each in part if each["model"] == "megatron"]
    assert assert_agreement(hf, ours) > 50 and not [each for each in records[1] if each["model"] == "hf"]


def test_gradients_of_experts_on_several_ranks_are_refused() -> None:
    from transcoder.mesh import Mesh
    from transcoder.runtime import comparison

    config = json.loads((EXAMPLE / "config.json").read_text())
    with pytest.raises(UsageError, match="--backward: experts must stay on one rank"):
        comparison.enter(config, Mesh(ep=2), comparison.Watch(backward=True))
