"""What configs say of layers of their own shape, in both spellings; what the layers here would do otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from megatron.core.transformer.utils import is_layer_window_attention

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from generating import model_of
from read_by_hand import config_of
from shaped_models import DENSE, FULL, KINDS, LAYERS, SLIDING, VOCABULARY, WINDOW, YARN, make_model
from test_runtime_decoding import LENGTH, Tape, graphs, steps

import transcoder
from transcoder import InputError, UsageError
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.recipes import registry
from transcoder.runtime import model as running
from transcoder.runtime.arithmetic import make_exact
from transcoder.runtime.attention import ScoredAttention
from transcoder.runtime.cache import KVCache
from transcoder.runtime.config import transformer_config
from transcoder.runtime.device import shutdown
from transcoder.runtime.fields import stored_model
from transcoder.runtime.joining import plain_activation
from transcoder.runtime.load import load
from transcoder.runtime.model import build_model, stage_forward
from transcoder.runtime.rotary import local_rotary, rotary
from transcoder.runtime.switches import NAMES, Switches

recorded = graphs  # the fixture
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a kind to its directory; process groups are gone afterwards."""
    root = tmp_path_factory.mktemp("shaped")
    yield cache(lambda kind: make_model(kind, root / kind))
    shutdown()


BOTH_NORMS = {"post_norms": True, "layernorm_zero_centered_gamma": True, "inner_multiplier": True}
# Read off each config by hand; every switch that is not named has its default.
SAID: dict[str, dict[str, Any]] = {
    "gpt-oss": {"late_rounding": True, "softmax_type": "learnable", "window_size": (WINDOW - 1, 0)},
    "gemma2": BOTH_NORMS
    | {"attention_softcap": 3.0, "logits_softcap": 5.0, "embedding_multiplier": 72**0.5, "softmax_scale": 20**-0.5},
    "gemma3": BOTH_NORMS
    | {"local_rotary_base": 1e2, "embedding_multiplier": 72**0.5, "window_attn_skip_freq": [1, 1, 0, 1]},
    "phi3": {"window_size": (WINDOW - 1, 0)},
    "phi4": {"window_size": None},
    "olmo2": {"pre_norms": False, "post_norms": True, "late_rounding": True, "wide_rotation": True}
    | {"wide_qk_norm": True},
    "olmo3": {"pre_norms": False, "post_norms": True, "late_rounding": True, "wide_rotation": True}
    | {"wide_qk_norm": True, "local_rotary_base": 1e4, "window_attn_skip_freq": [1, 1, 1, 0]},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_means_what_is_read_off_it_by_hand(kind: str, models: Models) -> None:
    found = transformer_config(read_config(models(kind)), Mesh())
    want = vars(Switches()) | SAID[kind]
    assert {name: getattr(found, name) for name in want} == want


def test_tables_name_switches_and_nothing_else() -> None:
    used = {name for recipe in registry().values() for name in recipe.runs}
    assert used <= NAMES and {"embedding_multiplier", "late_rounding", "wide_rotation"} <= used


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 wrote it."""
    found = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = config["rope_parameters"]
    whole = dict(rope.get(FULL, rope))
    found |= {"torch_dtype": config["dtype"], "rope_theta": whole.pop("rope_theta")}
    if "partial_rotary_factor" in whole:
        found["partial_rotary_factor"] = whole.pop("partial_rotary_factor")
    if config["model_type"] == "gemma3_text":
        found["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        found["layer_types"] = config["layer_types"]
    return found | {"rope_scaling": whole if whole["rope_type"] != "default" else None}


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings_of_a_config_give_one_model(kind: str, models: Models) -> None:
    config = read_config(models(kind))
    new, old = build_model(config, Mesh()), build_model(older(config), Mesh())
    fields = {name: value for name, value in vars(new.config).items() if not callable(value)}
    assert len(fields) > 100 and fields == {name: vars(old.config)[name] for name in fields}
    assert torch.equal(new.rotary_pos_emb.inv_freq, old.rotary_pos_emb.inv_freq)
    assert str(local_rotary(config)) == str(local_rotary(older(config)))


@pytest.mark.parametrize("kind", ("gemma3", "olmo3"))
def test_both_rotations_are_those_of_transformers(kind: str, models: Models) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = read_config(models(kind))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.rotary_emb
    inv_freq, factor = rotary(config)
    assert torch.equal(inv_freq, theirs.full_attention_inv_freq) and factor == theirs.full_attention_attention_scaling
    assert torch.equal(local_rotary(config), theirs.sliding_attention_inv_freq)
    assert (factor > 1.1) == (kind == "olmo3") and not torch.equal(inv_freq, local_rotary(config))


@pytest.mark.parametrize("kind", ("gpt-oss", "gemma2", "gemma3", "olmo3"))
def test_a_config_silent_on_kinds_of_layers_means_what_transformers_means(kind: str, models: Models) -> None:
    from transformers import AutoConfig

    config = read_config(models(kind)) | {"num_hidden_layers": 13}
    silent = {name: value for name, value in config.items() if name not in ("layer_types", "_sliding_window_pattern")}
    found, want = transformer_config(silent, Mesh()), AutoConfig.for_model(**silent).layer_types
    windows = [is_layer_window_attention(found.window_size, found.window_attn_skip_freq, n + 1) for n in range(13)]
    assert windows == [name == SLIDING for name in want] and 0 < sum(windows) < 13


def test_experts_with_biases_are_not_cut(models: Models) -> None:
    with pytest.raises(UsageError, match="--etp 2: experts with biases are not cut; leave it at 1"):
        build_model(read_config(models("gpt-oss")), Mesh(etp=2))


OTHERWISE = {
    "activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention has no counter"),
    "rhythm of windows": ("gpt-oss", {"layer_types": [SLIDING] * LAYERS}, r"layer_types \['sliding_attention'"),
    "slope of experts": ("gpt-oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5"),
    "long rope": ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
    "text for a factor": ("granite", {"residual_multiplier": "0.22"}, "residual_multiplier '0.22'"),
    "text for a cap": ("gemma2", {"attn_logit_softcapping": [50.0]}, r"attention_softcap \[50"),
    "text for a scale": ("granite", {"attention_multiplier": "x"}, "softmax_scale 'x'"),
    "factor of windows": (
        "olmo3",
        {"rope_parameters": {FULL: YARN, SLIDING: YARN}},
        "on the rotation of layers with windows",
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_layers_here_would_do_otherwise_is_refused(name: str, models: Models) -> None:
    kind, changes, message = OTHERWISE[name]
    with pytest.raises(InputError, match=message):
        build_model(read_config(models(kind)) | changes, Mesh())


@pytest.mark.parametrize("kind", ("gpt-oss", "gemma2", "gemma3", "granite"))
def test_a_checkpoint_that_lost_its_config_is_not_taken_for_a_plainer_model(kind: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(make_model(kind, tmp_path / "hf"), tmp_path / "mcore", sync=False)
    with pytest.raises(InputError, match="the runtime cannot build this model"):
        stored_model(tmp_path / "mcore" / "iter_0000000")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", DENSE)
def test_recorded_steps_give_the_same_bits(kind: str, dtype: str, models: Models, recorded: list[Tape]) -> None:
    model = model_of(models(kind), dtype=dtype)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    found = steps(model, tokens, KVCache(model, 2, LENGTH))
    assert len(recorded) == 1 and len(recorded[0].graphs) == LAYERS + 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "recordable", lambda *_: False)
        wanted = steps(model, tokens, KVCache(model, 2, LENGTH))
    assert len(recorded) == 1 and all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_gpt_oss_is_not_recorded(models: Models, recorded: list[Tape]) -> None:
    model = model_of(models("gpt-oss"))
    tokens = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(7))
    assert len(steps(model, tokens, KVCache(model, 1, LENGTH))) == LENGTH - 4 and not recorded


def test_keys_are_cached_in_the_type_of_the_model(models: Models) -> None:
    model = model_of(models("olmo2"), dtype="bfloat16")
    store = KVCache(model, 1, 8)
    stage_forward(model, torch.arange(8)[None], cache=store)
    memory = [tensor for pair in store._memory.values() for tensor in pair]
    assert len(memory) == 2 * LAYERS and {tensor.dtype for tensor in memory} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ("gemma2", "gpt-oss", "granite"))
def test_exact_arithmetic_keeps_what_the_model_computes(kind: str, models: Models) -> None:
    tokens = torch.randint(VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(9))
    plain = stage_forward(model_of(models(kind)), tokens)
    model = build_model(read_config(models(kind)), Mesh())
    load(model, models(kind))
    make_exact(model)
    assert (stage_forward(model, tokens) - plain).abs().max() <= 1e-4 * plain.std()


def test_gradients_flow_through_norms_behind_blocks(models: Models) -> None:
    model = build_model(read_config(models("gemma2")), Mesh())
    load(model, models("gemma2"))
    tokens = torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(9))
    with torch.enable_grad():
        stage_forward.__wrapped__(model, tokens).square().mean().backward()
    grads = [each.grad for each in model.parameters()]
    assert len(grads) == 2 + LAYERS * 8
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)
    out = stage_forward(model, tokens)
    assert not out.requires_grad


def test_a_mask_hides_in_scored_attention_too(models: Models) -> None:
    core = model_of(models("gpt-oss")).decoder.layers[0].self_attention.core_attention
    assert isinstance(core, ScoredAttention)
    query, key, value = torch.randn(3, 6, 1, 12, 8, generator=torch.Generator().manual_seed(2))
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[:, 1] = True
    changed = value.clone()
    changed[1] += 100
    with torch.no_grad():
        one, other = (core(query, key, each, hidden) for each in (value, changed))
        open_one, open_other = (core(query, key, each) for each in (value, changed))
    assert torch.equal(one[2:], other[2:]) and not torch.allclose(open_one[2:], open_other[2:])


def test_activations_are_those_of_transformers() -> None:
    from megatron.core.activations import fast_gelu, quick_gelu
    from transformers.activations import ACT2FN

    values = torch.randn(999, generator=torch.Generator().manual_seed(3), dtype=torch.float32).bfloat16()
    assert torch.equal(plain_activation(fast_gelu)(values), ACT2FN["gelu_pytorch_tanh"](values))
    assert torch.equal(plain_activation(quick_gelu)(values), ACT2FN["quick_gelu"](values))
    assert plain_activation(torch.relu) is torch.relu


def test_experts_of_four_bits_speak_from_their_files_as_converted(tmp_path: Path) -> None:
    folder = zoo.made("gpt-oss-mxfp4")
    transcoder.hf2mcore(folder, tmp_path / "mcore", sync=False)
    tokens = torch.randint(131, (1, 30), generator=torch.Generator().manual_seed(4))
    straight, converted = (stage_forward(model_of(folder, each), tokens) for each in (folder, tmp_path / "mcore"))
    assert torch.equal(straight, converted) and float(straight.std()) > 0.1


def test_the_zoo_s_own_values_are_read_too() -> None:
    for kind in ("gemma2", "gemma3", "granite", "olmo3", "phi3", "gpt-oss"):
        assert transformer_config(config_of(kind), Mesh(), "bfloat16").params_dtype == torch.bfloat16
