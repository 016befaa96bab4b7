"""The same model in transformers: loaded, run once over a prompt, in the asked type and in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transcoder.errors import UsageError, refuse
from transcoder.recipes import registry
from transcoder.runtime.session import Request
from transcoder.runtime.vision import image_token


def model_class(config: Mapping[str, Any], wanted: str | None) -> Any:
    """The class of transformers. Raises UsageError when it has none of this name."""
    import transformers

    name = wanted or config["architectures"][0]
    same = registry()[name].hf if not wanted and name in registry() else ()  # such as DeepSeek-V3, which Kimi K2 is
    classes = [getattr(transformers, each, None) for each in (name, *same)]
    found = next((each for each in classes if hasattr(each, "from_pretrained")), None)
    if found is None:
        raise UsageError(f"--model_class {name}: transformers has no such model class", kind="model-class")
    return found


def load_reference(folder: Path, config: Mapping[str, Any], wanted: str | None, dtype: str, device: str) -> Any:
    """The model with its weights, on a device. Raises UsageError and InputError."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = model_class(config, wanted)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
    options["attn_implementation"] = "sdpa" if kind._supports_sdpa else "eager"
    if "num_experts_per_tok" in config:  # the grouped product wants rows of 16 bytes
        options["experts_implementation"] = "eager"
    try:
        model = kind.from_pretrained(folder, trust_remote_code=False, **options, **_typed(kind, folder, config))
    except Exception as error:  # safetensors raises an Exception of its own for a damaged file
        raise refuse("reference", f"{folder}: transformers cannot load the model: {error}") from error
    return model.to(device).eval()


def _typed(kind: Any, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a class whose type the file does not name, as Kimi K2's: the type says how the weights are read."""
    own = getattr(getattr(kind, "config_class", None), "model_type", "")
    if own in ("", config.get("model_type")):
        return {}
    found = kind.config_class.from_pretrained(folder, local_files_only=True)
    found.model_type = own
    return {"config": found}


def widen(model: Any) -> Any:
    """The model in float32 with its rounded weights; its buffers never were anything else."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def inputs_of(config: Mapping[str, Any], request: Request, device: str) -> dict[str, Any]:
    """What a forward in transformers takes."""
    tokens = torch.tensor([request.ids], device=device)
    found: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    if request.pixels is not None:
        found |= {
            "pixel_values": torch.from_numpy(request.pixels).to(device),
            "image_grid_thw": torch.tensor(request.grids, device=device),
            "mm_token_type_ids": (tokens == image_token(config)).to(tokens.dtype),
        }
    return found


def logits_of(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Logits [positions, vocabulary]."""
    with torch.no_grad():
        return model(**inputs).logits[0]


def next_token_loss(logits: Any, ids: tuple[int, ...]) -> Any:
    """The mean cross entropy of the prompt's own next tokens."""
    wanted = torch.tensor(ids[1:], device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1].float(), wanted)
