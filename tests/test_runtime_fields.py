"""Windows, rotations and stored configurations: each says of a model what transformers or its config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from read_by_hand import config_of

import transcoder
from transcoder import InputError
from transcoder.mesh import Mesh
from transcoder.runtime.config import configured, model_arguments, transformer_config
from transcoder.runtime.fields import fields_of, stored_model
from transcoder.runtime.rotary import rope_settings, rotary

WINDOWS = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3-moe": {"use_sliding_window": True, "sliding_window": 8},
    "qwen2-moe": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    "qwen2.5-vl": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "dots1": {"sliding_window": 3, "max_window_layers": 2},
    "llama": {"sliding_window": 5},
}
WITHOUT_LIST = {"mistral": 0, "mixtral": 1, "qwen3-moe": 1, "llama": 0}  # whether all layers have windows or none


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_where_transformers_has_them(kind: str) -> None:
    from transformers import AutoConfig

    config = config_of(kind)
    part = config.get("text_config", config)
    part |= WINDOWS[kind]
    part.pop("layer_types", None)
    want = AutoConfig.for_model(**config)
    want = getattr(want, "text_config", want)
    kinds = want.layer_types if kind not in WITHOUT_LIST else ["sliding_attention" if WITHOUT_LIST[kind] else ""] * 3
    layers = [int(name == "sliding_attention") for name in kinds]
    for listed in (part, part | {"layer_types": kinds}) if kind not in WITHOUT_LIST else (part,):
        fields = fields_of(config | {"text_config": listed} if "text_config" in config else config | listed)
        found = configured(fields, Mesh())
        assert (found.window_size, found.window_attn_skip_freq) == (
            ((want.sliding_window - 1, 0), layers) if any(layers) else (None, None)
        )


@pytest.mark.parametrize("kind", ("qwen2", "qwen3", "qwen2-moe", "dots1"))
def test_a_config_silent_on_where_windows_start_means_what_transformers_means(kind: str) -> None:
    from transformers import AutoConfig

    config = config_of(kind) | {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 70}
    config = {name: value for name, value in config.items() if name not in ("layer_types", "max_window_layers")}
    want = [int(name == "sliding_attention") for name in AutoConfig.for_model(**config).layer_types]
    assert 0 < sum(want) < 70
    assert fields_of(config)["window_attn_skip_freq"] == want


@pytest.mark.parametrize("kind", ("glm4-moe", "qwen3-next", "phi3", "dots1", "granite", "llama", "qwen3"))
def test_as_much_of_each_head_is_rotated_as_transformers_rotates(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(kind)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    inv_freq, factor = rotary(config)
    assert torch.equal(inv_freq, model.model.rotary_emb.inv_freq) and factor == 1.0


KEPT = (
    "llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3", "qwen3-moe", "qwen3-moe-mixed", "mixtral",
    "qwen2-moe", "olmoe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-mtp", "kimi-k2", "glm4-moe",
    "dots1",
)  # fmt: skip


# What Megatron-LM's arguments say of every model.
LATENT_ARGUMENTS = {
    "multi_latent_attention": False, "q_lora_rank": None, "kv_lora_rank": 32, "qk_head_dim": 128, "v_head_dim": 128,
    "qk_pos_emb_head_dim": 64, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "rope_type": None,
}  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    """All fields, but for the functions that draw initial values, which are made anew each time."""
    return {name: value for name, value in vars(config).items() if not name.endswith("init_method")}


@pytest.mark.parametrize("kind", KEPT)
def test_a_checkpoint_without_config_says_the_same_itself(kind: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(zoo.made(kind), tmp_path / "mcore", make_vocab_size_divisible_by=1, sync=False)
    folder, config = tmp_path / "mcore" / "iter_0000000", config_of(kind)
    want = plain(transformer_config(config, Mesh()))
    for _ in ("run_config.yaml", "common.pt"):
        fields = stored_model(folder)
        assert plain(transformer_config(fields, Mesh())) == want
        assert model_arguments(fields) == model_arguments(config)
        assert torch.equal(rotary(fields)[0], rotary(config)[0])
        (folder / "run_config.yaml").unlink(missing_ok=True)


def test_arguments_of_latent_attention_say_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    transcoder.hf2mcore(zoo.made("qwen3"), tmp_path / "mcore", make_vocab_size_divisible_by=1, sync=False)
    folder = tmp_path / "mcore" / "iter_0000000"
    (folder / "run_config.yaml").unlink()
    common = torch.load(folder / "common.pt", weights_only=False)
    vars(common["args"]).update(LATENT_ARGUMENTS)
    torch.save(common, folder / "common.pt")
    config, fields = config_of("qwen3"), stored_model(folder)
    assert plain(transformer_config(fields, Mesh())) == plain(transformer_config(config, Mesh()))
    assert torch.equal(rotary(fields)[0], rotary(config)[0])


SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_fields_of_megatron_mean_the_same_rotation(name: str) -> None:
    config = config_of("llama") | {"rope_parameters": SCALED[name]}
    fields = fields_of(config)
    assert rope_settings(fields) == SCALED[name]
    assert torch.equal(rotary(fields)[0], rotary(config)[0])


def test_yarn_of_megatron_means_the_same_rotation() -> None:
    config = config_of("gpt-oss")
    one, two = rotary(config), rotary(fields_of(config))
    assert torch.equal(one[0], two[0]) and one[1] == two[1] > 1.3


@pytest.mark.parametrize("kind", ("gpt-oss", "gemma2", "nemotron-h", "qwen3-next"))
def test_a_checkpoint_of_other_layers_without_config_is_refused(kind: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(zoo.made(kind), tmp_path / "mcore", sync=False)
    with pytest.raises(InputError, match="the runtime cannot build this model"):
        stored_model(tmp_path / "mcore" / "iter_0000000")
