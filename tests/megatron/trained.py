"""The cases that trainer.py trains, and the comparison of an export with the live model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle, Place

TRAINER = Path(__file__).resolve().parent / "trainer.py"
Case = dict[str, Any]
DENSE: Case = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 12,
    "layernorm_epsilon": 1e-5,
}
SPARSE: Case = DENSE | {
    "qk_layernorm": True,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_aux_loss_coeff": 0.001,
}
CLASSES = {False: "LlamaForCausalLM", True: "Qwen3MoeForCausalLM"}


def case(root: Path, name: str, model: Case, sharding: str, **fields: Any) -> Case:
    """A case of the trainer; the vocabulary is smaller than the embedding."""
    usual = {"tp": 1, "pp": 1, "rows": 64, "vocab": 61, "tied": False, "base": 5000, "format": "torch_dist"}
    metadata = {"distrib_optim_sharding_type": sharding}
    place = {"name": name, "model": model, "out": str(root / name), "distributed": bool(sharding)}
    return usual | place | {"metadata": metadata if sharding else {}} | fields


def architecture(case: Case) -> str:
    """The Hugging Face class of a case's model."""
    return CLASSES["num_moe_experts" in case["model"]]


def assert_trained(case: Case, exported: Path) -> None:
    """Every live parameter of every rank, but for those of prediction layers, is in the export, bit for bit."""
    config = json.loads((exported / "config.json").read_text())
    files = sorted(Path(case["out"]).glob("live-*.pt"))
    assert len(files) == 2
    for file in files:
        live = torch.load(file, weights_only=False)
        oracle = Oracle(exported, config, Place(**live["place"]))
        compared = [_compare(oracle, case, *row) for row in live["parameters"] if not row[0].startswith("mtp.")]
        assert len(compared) > 5


def _compare(oracle: Oracle, case: Case, name: str, layer: int | None, value: torch.Tensor) -> None:
    wanted = oracle.expected(name, layer)
    rank, count = oracle.place.tp
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        real = min(case["rows"] // count, case["vocab"] - rank * (case["rows"] // count))
        table = oracle.tensors["lm_head.weight" if name[0] == "o" and not case["tied"] else "model.embed_tokens.weight"]
        wanted, value = table[rank * (case["rows"] // count) :][:real], value[:real]
    assert wanted.dtype == value.dtype == torch.bfloat16
    assert torch.equal(wanted.view(torch.int16), value.contiguous().view(torch.int16)), (name, layer)
