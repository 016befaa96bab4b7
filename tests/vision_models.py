"""A tiny random Qwen2.5-VL with its tokenizer, template and image settings, and pictures to show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 301, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 1e4},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1, 3],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
    "min_pixels": 256, "max_pixels": 4096, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    "rescale_factor": 1 / 255, "resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True,
}  # fmt: skip


def _write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table))


def _tokenizer(folder: Path) -> None:
    """Bytes and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2]})


def make_vision_model(folder: Path) -> Path:
    """The model's directory, in float32."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {"image_token_id": 5, "vision_start_token_id": 3, "vision_end_token_id": 4, "video_token_id": 300}
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        centre, spread = (1.0, 0.2) if "norm" in name or "ln_q" in name else (0.0, 1.2 / parameter.shape[-1] ** 0.5)
        torch.nn.init.normal_(parameter, centre, spread, generator=generator)
    model.save_pretrained(folder, max_shard_size="200KB")
    _tokenizer(folder)
    _write(folder / "chat_template.json", {"chat_template": TEMPLATE})
    _write(folder / "preprocessor_config.json", SETTINGS)
    return folder


def make_picture(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    """A colour gradient with some noise."""
    from PIL import Image

    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    noise = np.random.default_rng(width).uniform(0, 60, (height, width))
    values = np.stack([across, down, (across + down) / 2 + noise], axis=-1)
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode).save(path)
    return path
