"""Writes a random Hugging Face model with a tokenizer, to generate with and to compare: text is no sense, numbers are.

python benchmarks/random_model.py llama-1b work/llama-1b --dtype bfloat16
python benchmarks/random_model.py llama-1b work/wrong --dtype bfloat16 --wrong 7   # gate, up of layer 7 exchanged
python benchmarks/random_model.py qwen2.5-vl work/vl                               # with picture.png in it
python benchmarks/random_model.py deepseek-v3 work/v3 --dtype bfloat16             # true widths, 3 layers, 16 experts
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
LLAMA = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 2048,
}  # fmt: skip
LARGER = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16}
EXPERTS = {
    "num_hidden_layers": 8, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "use_sliding_window": False,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 16000, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 4, "max_position_embeddings": 163840, "initializer_range": 0.006,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
GPT_OSS = {"vocab_size": 16000, "num_hidden_layers": 4, "num_local_experts": 16}
ROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
EYES = {"depth": 8, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "out_hidden_size": 768}
IDS = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
    "min_pixels": 3136, "max_pixels": 401408, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    "rescale_factor": 1 / 255, "resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True,
}  # fmt: skip
KINDS = ("llama-100m", "llama-1b", "qwen3-moe", "qwen2.5-vl", "deepseek-v3", "gpt-oss")


def _config(kind: str) -> Any:
    """The configuration; no token ends a text."""
    from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen2_5_VLConfig, Qwen3MoeConfig

    fixed = {"eos_token_id": None, "bos_token_id": None, "tie_word_embeddings": False}
    if kind == "qwen3-moe":
        return Qwen3MoeConfig(**LLAMA | EXPERTS, **fixed)
    if kind == "deepseek-v3":
        return DeepseekV3Config(**DEEPSEEK, **fixed)
    if kind == "gpt-oss":
        return GptOssConfig(**GPT_OSS, **fixed)
    if kind == "qwen2.5-vl":
        eyes = EYES | {"fullatt_block_indexes": [3, 7]}
        return Qwen2_5_VLConfig(text_config=LLAMA | fixed | {"rope_parameters": ROPE}, vision_config=eyes, **IDS)
    return LlamaConfig(**LLAMA | (LARGER if kind == "llama-1b" else {}), **fixed)


def _model(kind: str, dtype: str) -> Any:
    """The model; what starts as ones or zeros is random, too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if kind == "qwen2.5-vl" else AutoModelForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = auto.from_config(_config(kind), dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_q" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.1)
    return model


def _write_tokenizer(folder: Path) -> None:
    """Bytes, and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate((*SPECIAL, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def _write_picture(folder: Path) -> None:
    """A gradient, and how pictures are prepared."""
    import numpy as np
    from PIL import Image

    across, down = np.meshgrid(np.linspace(0, 255, 320), np.linspace(0, 255, 240))
    values = np.stack([across, down, (across + down) / 2], axis=-1)
    Image.fromarray(values.astype(np.uint8)).save(folder / "picture.png")
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))


@torch.no_grad()
def _spoil(model: Any, layer: int) -> None:
    """Exchange gate and up of a layer."""
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


def make_model(folder: Path, kind: str, dtype: str, wrong: int | None = None) -> Path:
    """The model's directory. wrong: a layer whose gate and up are exchanged."""
    model = _model(kind, dtype)
    if wrong is not None:
        _spoil(model, wrong)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    if kind == "qwen2.5-vl":
        _write_picture(folder)
    return folder


def main() -> None:
    """Parse, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--wrong", type=int, metavar="LAYER", help="exchange gate and up of this layer")
    options = parser.parse_args()
    make_model(options.folder, options.kind, options.dtype, options.wrong)


if __name__ == "__main__":
    main()
