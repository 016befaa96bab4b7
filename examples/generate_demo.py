"""Generates from the example model with megatron-core on one process and on two, and compares with transformers.

python examples/generate_demo.py [--model DIR] [--prompt TEXT] [--tokens N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "======== GENERATED TEXT OUTPUT ========"
ALONE = ("-m", "transcoder.generate")
PAIR = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ALONE)
RUNS = {
    "one process": ALONE,
    "two processes, tensor-parallel 2": (*PAIR, "--tp", "2"),
    "two processes, pipeline-parallel 2": (*PAIR, "--pp", "2"),
}
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, count = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer(prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=int(count), do_sample=False, pad_token_id=0)
sys.stdout.write(tokenizer.decode(out[0]))
"""


def run(*arguments: str) -> str:
    """Stdout of this interpreter with arguments; a failure ends the demonstration."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    quiet = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if quiet.returncode:
        sys.exit(f"FAILED: {' '.join(arguments[:6])} …")
    return quiet.stdout


def generated(out: str) -> str:
    """The text of the final block."""
    block = out.split(MARK, 1)[1]
    return block.split("\nGenerated: ", 1)[1].rsplit("\n=", 1)[0]


def main() -> int:
    """Run all, print the texts, say whether they are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="examples/tiny-llama")
    parser.add_argument("--prompt", default="The assert statement")
    parser.add_argument("--tokens", default="64")
    options = parser.parse_args()
    words = ("--hf_model_path", options.model, "--prompt", options.prompt, "--max_new_tokens", options.tokens)
    texts = {}
    for name, start in RUNS.items():
        print(f"\n$ python {' '.join(start)} --hf_model_path {options.model} --prompt {options.prompt!r}", flush=True)
        texts[name] = generated(run(*start, *words, "--device", "cpu"))
        print(texts[name], flush=True)
    texts["transformers"] = run("-c", TRANSFORMERS, options.model, options.prompt, options.tokens)
    differing = [name for name, text in texts.items() if text != texts["transformers"]]
    if differing:
        print(f"\nFAILED: not the text of transformers: {', '.join(differing)}", file=sys.stderr)
        return 1
    print(f"\nOK: {', '.join(RUNS)} and transformers' generate give the same {len(texts['transformers'])} characters.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
