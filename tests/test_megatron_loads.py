"""Real megatron-core loads what we write, strictly, and its float32 logits agree with transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from harness import launch
from models import make_model

KINDS = ("llama", "llama-tied", "llama-attn-bias", "llama-groups", "mistral", "qwen2", "qwen3")


def test_megatron_core_loads_every_family_bit_for_bit(tmp_path: Path) -> None:
    cases = []
    for kind in KINDS:
        make_model(kind, tmp_path / kind)
        transcoder.hf2mcore(tmp_path / kind, tmp_path / f"{kind}-m", tp=2, pp=2)
        checkpoint = str(tmp_path / f"{kind}-m" / "iter_0000000")
        case = {"action": "load", "hf": str(tmp_path / kind), "ckpt": checkpoint, "tp": 1, "pp": 1}
        cases.append({**case, "spec": "te", "strict": "raise_all"})
    results = launch(cases, 1, tmp_path)
    assert len(results) == len(KINDS)
    assert all(result["ok"] for result in results), results
