"""The finder names the module that is wrong, at one process and at several, live and from log files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import EXAMPLE
from generating import torchrun

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker
from models import make_model

from transcoder.runtime import divergence, drawing
from transcoder.runtime.device import shutdown
from transcoder.runtime.sketches import distance, sketch, statistics

ATTENTION = "model.layers.1.self_attn"
QKV = "decoder.layers.1.self_attention.linear_qkv"
# The mistake: kind, what is wrong in the weights or the configuration, the pair and the side that must be named.
MISTAKES: dict[str, tuple[str, Any, tuple[str, str, str]]] = {
    "gate and up": (
        "llama",
        worker.exchanged("gate and up", 2),
        ("model.layers.2.mlp.gate_proj", "decoder.layers.2.mlp.linear_fc1", "output"),
    ),
    "q and k": ("llama-tied", worker.exchanged("q and k", 1), (f"{ATTENTION}.q_proj", QKV, "output")),
    "norm dropped": (
        "mistral",
        worker.replaced("model.layers.3.post_attention_layernorm.weight", torch.ones_like),
        ("model.layers.3.post_attention_layernorm", "decoder.layers.3.pre_mlp_layernorm", "output"),
    ),
    "query norm dropped": (
        "qwen3",
        worker.replaced(f"{ATTENTION}.q_norm.weight", torch.ones_like),
        (f"{ATTENTION}.q_norm", "decoder.layers.1.self_attention.q_layernorm", "output"),
    ),
    "rope base": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ("model.rotary_emb", "rotary_pos_emb", "output"),
    ),
    "order of groups": (
        "qwen2",
        worker.replaced(f"{ATTENTION}.k_proj.weight", lambda rows: torch.cat(rows.chunk(4)[::-1])),
        (f"{ATTENTION}.k_proj", QKV, "output"),
    ),
    "window": (
        "mistral",
        {"sliding_window": None},
        ("model.layers.0.self_attn.o_proj", "decoder.layers.0.self_attention.core_attention", "input"),
    ),
    "logits": ("llama", worker.replaced("lm_head.weight", torch.neg), ("lm_head", "output_layer", "output")),
    "experts": (
        "qwen3-moe",
        worker.exchanged("experts", 1),
        ("model.layers.1.mlp.experts", "decoder.layers.1.mlp.experts", "output"),
    ),
    "gate and up of an expert": (
        "olmoe",
        worker.exchanged("gate and up of an expert", 2),
        ("model.layers.2.mlp.experts", "decoder.layers.2.mlp.experts", "output"),
    ),
    "router": (
        "mixtral",
        worker.replaced("model.layers.0.block_sparse_moe.gate.weight", lambda rows: rows.flip(0)),
        ("model.layers.0.mlp.gate", "decoder.layers.0.mlp.router", "output"),
    ),
    "gate of the shared expert": (
        "qwen2-moe",
        worker.replaced("model.layers.1.mlp.shared_expert_gate.weight", torch.neg),
        ("model.layers.1.mlp", "decoder.layers.1.mlp", "output"),
    ),
}
DENSE = [name for name, (kind, _, _) in MISTAKES.items() if not kind.endswith(("moe", "mixtral"))]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a mistake (or the kind of a right model) to a worker's case."""
    root = tmp_path_factory.mktemp("models")
    return worker.cases(cache(lambda kind: make_model(kind, root / kind)), MISTAKES, root)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_and_its_module_is_named(name: str, case_of: Any) -> None:
    found = worker.run_case(case_of(name))
    assert not found["good"], found["checks"]
    assert tuple(found["first"]) == MISTAKES[name][2]


@pytest.mark.parametrize("name", DENSE)
def test_a_mistake_shows_in_bfloat16_too(name: str, case_of: Any) -> None:
    found = worker.run_case(case_of(name) | {"dtype": "bfloat16"})
    assert not found["good"], found["checks"]
    assert tuple(found["first"]) == MISTAKES[name][2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_right_dense_model_passes_in_bfloat16_with_the_same_bits(kind: str, dtype: str, case_of: Any) -> None:
    found = worker.run_case(case_of(kind) | {"dtype": dtype})
    assert found["good"] and found["first"] is None
    assert found["worst"] <= (5e-6 if dtype == "float32" else 0.0), found


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral", "qwen2-moe", "olmoe"])
def test_a_right_mixture_passes_in_bfloat16_judged_in_float32(kind: str, case_of: Any) -> None:
    found = worker.run_case(case_of(kind) | {"dtype": "bfloat16"})
    assert found["good"] and found["first"] is None
    assert found["largest"] > 1e-3 > found["worst"]
    assert all(check.startswith("float32: ") for check in found["checks"])


def test_every_module_of_a_layer_is_paired(case_of: Any) -> None:
    pairs = {tuple(pair) for pair in worker.run_case(case_of("qwen3"))["pairs"]}
    hf = {reference.removeprefix("model.layers.3.") for reference, _, _ in pairs if ".layers.3." in reference}
    projections = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    mlp = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert hf == projections | mlp | {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert ("model.layers.3", "decoder.layers.3", "output") in pairs
    assert ("model.layers.3.mlp.down_proj", "decoder.layers.3.mlp.linear_fc2", "input") in pairs
    assert {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"} <= {pair[0] for pair in pairs}


GRIDS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("llama", {"tp": 2}),
        ("llama", {"tp": 2, "dtype": "bfloat16"}),
        ("qwen3", {"pp": 2, "dtype": "bfloat16"}),
        ("olmoe", {"tp": 2}),
        ("qwen2-moe", {"ep": 2}),
        ("mixtral", {"etp": 2}),
        ("gate and up", {"tp": 2}),
        ("q and k", {"tp": 2, "dtype": "bfloat16"}),
        ("norm dropped", {"pp": 2}),
        ("rope base", {"pp": 2}),
        ("window", {"tp": 2}),
        ("order of groups", {"tp": 2}),
        ("query norm dropped", {"tp": 2}),
        ("experts", {"ep": 2}),
        ("gate and up of an expert", {"tp": 2, "etp": 2}),
        ("logits", {"tp": 2}),
    ],
    4: [
        ("llama-groups", {"tp": 4}),
        ("qwen3-moe", {"tp": 2, "pp": 2, "ep": 2}),
        ("olmoe", {"ep": 2, "etp": 2, "tp": 2}),
        ("gate and up", {"tp": 2, "pp": 2}),
        ("experts", {"pp": 2, "ep": 2}),
    ],
}


def run_grids(world: int, case_of: Any, folder: Path, command: list[str]) -> str:
    """Run all grids of a world, and then the command, in one launch; check every answer. Returns stdout."""
    cases = [case_of(name) | grid for name, grid in GRIDS[world]]
    cases[-1] |= {"command": command}
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    status, out, err = torchrun(world, str(Path(worker.__file__)), str(path))
    assert status == 0, f"{out}\n{err[-6000:]}"
    for (name, grid), found in zip(GRIDS[world], json.loads(Path(f"{path}.out").read_text()), strict=True):
        want = list(MISTAKES[name][2]) if name in MISTAKES else None
        assert (found["good"], found["first"]) == (want is None, want), (name, grid, found)
    return out


def test_every_grid_of_two_gives_the_same_answer_and_logs_are_read_together(case_of: Any, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = [
        "--hf_model_path", str(EXAMPLE), "--prompt", "The assert statement", "--tp", "2", "--enable_debug_hooks",
        "--log-dir", str(logs),
    ]  # fmt: skip
    out = run_grids(2, case_of, tmp_path, command)
    assert out.count("=== COMPARISON COMPLETE ===") == 1 and "\nVerdict: PASS\n" in out
    assert "\nFirst divergence: none in 81 tensors\n" in out
    megatron = [f"megatron_debug_component_0_fwd_log_2_rank_{rank}.jsonl" for rank in range(2)]
    hf = "hf_debug_fwd_log_2_rank_0.jsonl"
    assert sorted(path.name for path in logs.iterdir()) == [hf, *megatron]
    records = [divergence.read_log(logs / name) for name in (hf, megatron[0])]
    compared = divergence.compare(*records)
    assert len(compared) == 81 and divergence.first(compared) is None
    alone = [each for each in records[1] if each["place"]["tp"] == 0]
    assert divergence.first(divergence.compare(records[0], alone)).module.endswith("linear_qkv")


@pytest.mark.slow
def test_every_grid_of_four_gives_the_same_answer(case_of: Any, tmp_path: Path) -> None:
    run_grids(4, case_of, tmp_path, [])


def record(module: str, hf: str, values: torch.Tensor, model: str = "megatron", **place: Any) -> dict[str, Any]:
    """One line of a log."""
    part = {"hf": hf, "side": "output", "how": "whole", "sketch": sketch(values)}
    return {"model": model, "module": module, "outputs": [statistics(values)], "parts": [part], **place}


def test_the_sketches_of_shards_add_up_and_tell_how_far_tensors_are_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(40, 64, generator=generator) for _ in range(2))
    order = torch.randperm(64, generator=generator)
    parts = [sketch(one[:, part], part) for part in order.split(16)]
    added = [sum(column) for column in zip(*parts, strict=True)]
    assert distance(sketch(one), added, 1.0) < 1e-12
    true = float((one - other).norm())
    assert 0.6 * true < distance(sketch(one), sketch(other), 1.0) < 1.5 * true
    assert distance(sketch(one), sketch(one.flip(0)), float(one.norm())) > 0.5
    assert sketch(one, tokens_alike=True) == pytest.approx(sketch(one.flip(0), tokens_alike=True))


def test_what_is_not_a_number_is_a_divergence() -> None:
    values = torch.ones(3, 4)
    records = [record("a", "a", values, "hf"), record("b", "b", values, "hf")]
    broken = [record("x", "a", values), record("y", "b", values * float("nan"))]
    compared = divergence.compare(records, broken)
    assert [each.differs for each in compared] == [False, True]
    assert divergence.line(compared) == "First divergence: b <-> y (output, relative error nan, bound 3.2e-05)"


def test_slow_growth_is_no_divergence_and_a_jump_is() -> None:
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    grown = [values * (1 + 2e-5 * 3**step) for step in range(5)] + [values * 1.5]
    names = [str(step) for step in range(6)]
    theirs = [record(name, name, values, "hf") for name in names]
    ours = [record(name, name, each) for name, each in zip(names, grown, strict=True)]
    assert divergence.first(divergence.compare(theirs, ours)).module == "5"


def test_the_drawing_asks_nothing_of_a_network_and_shows_every_pair() -> None:
    values = torch.ones(3, 4)
    theirs = [record(f"model.layers.{n}", f"model.layers.{n}", values, "hf") for n in range(3)]
    ours = [record(f"decoder.layers.{n}", f"model.layers.{n}", values * (1 + n)) for n in range(3)]
    page = drawing.page(divergence.compare(theirs, ours), "<title> & prompt")
    assert page.count("<circle") == 3 and page.count('<tr class="differs"') == 2
    assert "&lt;title&gt; &amp; prompt" in page and "<title> &" not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == page.count("<script") == 0
