"""Trains the example model: a 1.0M-parameter Llama on the first pages of Python's own reference text.

Eight heads in four groups, so it divides by tensor-parallel sizes 1, 2 and 4. Needs torch, transformers and
tokenizers; about two minutes on one CPU thread:

    python examples/train_tiny_llama.py --out examples/tiny-llama
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = 40_000
VOCABULARY = 1024
END = "<|endoftext|>"
BATCH, LENGTH = 8, 128
PEAK_RATE, WARM_UP = 3e-3, 50
SHARD_SIZE = "800KB"
PROMPTS = ("The assert statement", "An assignment statement evaluates", "The following")


def corpus() -> str:
    """The first 40,000 characters of pydoc's topics.

    >>> len(corpus())
    40000
    """
    return "\n\n".join(topics.values())[:CHARACTERS]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1024 entries; entry 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=LENGTH * 2)


def configuration() -> LlamaConfig:
    """The shape of the model; every size divides by 4."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH * 2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: a linear warm-up, then half a cosine.

    >>> rate(0, 600), rate(49, 600), round(rate(600, 600), 6)
    (0.02, 1.0, 0.0)
    """
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def train(tokens: torch.Tensor, steps: int) -> LlamaForCausalLM:
    """Trains a fresh model on random windows of the tokens; prints the loss every 50 steps."""
    model = LlamaForCausalLM(configuration())
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def clear(folder: Path) -> None:
    """Removes the shards and index of an earlier run; nothing else in the folder is touched."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves weights as bf16 shards beside config, generation config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("model*.safetensors"):
        weights.chmod(0o644)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def show(folder: Path) -> None:
    """Reads the saved model back and prints what it writes after each prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        print(f"{prompt!r} -> {tokenizer.decode(answer[0, ids.shape[1] :])!r}")


def main() -> None:
    """Trains, saves and shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-llama"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = corpus()
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    print(f"Python {platform.python_version()}: {len(text)} characters, {len(tokens)} tokens")
    model = train(tokens, options.steps)
    print(f"{model.num_parameters():,} parameters")
    save(model, tokenizer, options.out)
    show(options.out)


if __name__ == "__main__":
    main()
