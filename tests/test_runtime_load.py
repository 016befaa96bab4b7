"""Live megatron-core models are filled in place, strictly, with this rank's bytes alone and little memory beside."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transcoder
from transcoder import InputError

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import harness
from matrix import ALL_EXPERT_KINDS, ALL_KINDS, EXPERT_SPECS, SPECS, Grid, Workshop, expert_grids_of, grids_of
from models import read_config
from oracle import read_tensors
from test_megatron_experts import WRITTEN, layout_for

from transcoder.runtime.aliases import unused
from transcoder.runtime.load import load
from transcoder.runtime.model import build

WORKER = Path(__file__).parent / "megatron" / "load_worker.py"
LAYOUTS = ("stacked", "per-layer", "singleton")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("fills"))


def case_of(workshop: Workshop, kind: str, grid: Grid, spec: str, turn: int) -> dict[str, Any]:
    """A model at a grid, and a checkpoint of it that was written at another one."""
    experts = kind in ALL_EXPERT_KINDS
    written = [each if experts else each[:2] for each in WRITTEN if each != grid]
    layout = layout_for(kind, turn) if experts else LAYOUTS[turn % 3]
    found = workshop.load_case(kind, written[turn % len(written)], grid, spec, layout=layout)
    return found | {"action": "ours", "stock": turn % 4 == 0}


def cases_of(workshop: Workshop, world: int) -> list[dict[str, Any]]:
    """Every kind once, at the grids of a world in turn, with the layer specs in turn."""
    cases = []
    for kinds, specs, grids in (
        (ALL_KINDS, SPECS, grids_of(world)),
        (ALL_EXPERT_KINDS, EXPERT_SPECS, expert_grids_of(world)),
    ):
        for turn, kind in enumerate(kinds):
            grid, spec = grids[(turn * 9 + 3) % len(grids)], specs[(turn + world // 2) % len(specs)]
            cases.append(case_of(workshop, kind, grid, spec, turn))
    return cases


def saved_case(workshop: Workshop, grid: Grid, dialect: str) -> dict[str, Any]:
    found = workshop.save_case("qwen3-moe", grid, "local", dialect)
    return found | {"action": "saved", "ckpt": f"{found['ckpt']}-biased"}


def listed_case(workshop: Workshop) -> dict[str, Any]:
    """A model that asks for single layers of a checkpoint with stacked keys, under the other name of the norm."""
    found = workshop.load_case("qwen3-moe", (1, 1, 1, 1), (1, 1, 1, 1), "te", layout="stacked")
    return found | {"action": "ours", "spec": "listed", "stock": False}


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_every_family_is_filled_bit_for_bit_from_both_sources(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(harness, "WORKER", WORKER)
    cases = cases_of(workshop, world)
    cases += [listed_case(workshop)] if world == 2 else []
    cases += [saved_case(workshop, (1, 2, 2, 1), dialect) for dialect in LAYOUTS] if world == 4 else []
    cases.sort(key=lambda case: [case.get(name, 1) for name in ("tp", "pp", "ep", "etp")])
    results = harness.launch(cases, world, tmp_path)
    assert len(results) == len(cases) > 15
    assert all(result["ok"] and min(result["parameters"]) > 0 for result in results)


def filled(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


@torch.no_grad()
def spoiled(config: Path | dict[str, Any], dtype: str = "float32") -> Any:
    """A model of NaNs."""
    model = build(config, dtype=dtype, device="cpu")
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model


def assert_untouched(model: Any) -> None:
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.fixture(scope="module")
def llama(workshop: Workshop) -> Path:
    return workshop.model("llama")


@pytest.fixture(scope="module")
def stored(workshop: Workshop) -> Path:
    """Llama as a checkpoint of 2 × 2 ranks; the parent, with its trackers."""
    return workshop.checkpoint("llama", (2, 2), "", "", "te", "torch_dist").parent


@pytest.fixture
def own(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored / "iter_0000000", tmp_path / "own")


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_elements_take_the_models_type(llama: Path, stored: Path, dtype: str) -> None:
    one, two = spoiled(llama, dtype), spoiled(llama, dtype)
    load(one, llama), load(two, stored)
    want = load_file(next(llama.glob("*00001-of*")))["model.embed_tokens.weight"].to(getattr(torch, dtype))
    assert torch.equal(filled(one)["embedding.word_embeddings.weight"][: len(want)], want)
    assert all(torch.equal(tensor, filled(two)[name]) for name, tensor in filled(one).items())


def quantised(source: Path, folder: Path) -> Path:
    """The model with its projections in FP8, one scale for every 32 × 16 weights."""
    folder.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(source).items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = (tensors[name] * 16).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 32), -(-columns // 16)) + 0.5
    save_file(tensors, folder / "model.safetensors")
    config = read_config(source) | {"dtype": "bfloat16", "quantization_config": {"weight_block_size": [32, 16]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_weights_are_decoded(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.engine.BAND", 5000)
    source = quantised(workshop.model("qwen3"), tmp_path / "fp8")
    transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)
    one, two = spoiled(source, "bfloat16"), spoiled(source, "bfloat16")
    load(one, source), load(two, tmp_path / "mcore")
    assert all(torch.equal(tensor, filled(two)[name]) for name, tensor in filled(one).items())
    assert len(filled(one)["decoder.layers.0.mlp.linear_fc1.weight"].unique()) > 1000


def test_padding_becomes_zeros_and_rows_of_padding_may_be_missing(llama: Path, tmp_path: Path) -> None:
    transcoder.hf2mcore(llama, tmp_path / "wide", tp=2, make_vocab_size_divisible_by=500, sync=False)
    transcoder.hf2mcore(llama, tmp_path / "narrow", make_vocab_size_divisible_by=1, sync=False)
    config = read_config(llama)
    for source, rows in product((llama, tmp_path / "wide", tmp_path / "narrow"), (263, 300)):
        model = spoiled(config | {"vocab_size": rows})
        if source == llama:
            load(model, llama)
        else:
            load(model, source, llama)
        table = filled(model)["output_layer.weight"]
        assert table.shape[0] == rows and table[:263].abs().sum(1).all() and not table[263:].any()


CHANGES = {
    "tied": ({"tie_word_embeddings": True}, "output_layer.weight: expected no such tensor in this model"),
    "biased": ({"attention_bias": True}, r"linear_qkv.bias: expected a tensor of shape \[4, 120\]; found no such"),
    "fewer layers": ({"num_hidden_layers": 3}, r"expected a tensor of shape \[3, 72\]; found a tensor of shape \[4, "),
    "more layers": ({"num_hidden_layers": 5}, r"expected a tensor of shape \[5, 72\]; found a tensor of shape \[4, "),
    "ffn": ({"intermediate_size": 96}, r"linear_fc2.weight: expected a tensor of shape \[4, 72, 96\]; found a tensor"),
    "norms": ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "q_layernorm.weight: expected a tensor"),
    "vocabulary": ({"vocab_size": 200}, r"263 in the model|263 stored|the vocabulary has 263 rows|\[263, 72\]"),
}


@pytest.mark.parametrize("kind", ("hf", "mcore"))
@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_differs_from_the_source_is_refused_before_anything_is_written(
    llama: Path, stored: Path, name: str, kind: str
) -> None:
    changes, message = CHANGES[name]
    model = spoiled(read_config(llama) | changes)
    with pytest.raises(InputError, match=message) as caught:
        load(model, llama if kind == "hf" else stored)
    assert caught.value.kind == "tensors" and caught.value.problems
    assert_untouched(model)


def test_norms_that_the_model_has_not_are_refused(workshop: Workshop) -> None:
    config = read_config(workshop.model("qwen3")) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    model = spoiled(config)
    with pytest.raises(InputError, match=r"q_layernorm.weight: expected no such tensor in this model"):
        load(model, workshop.model("qwen3"))
    assert_untouched(model)


def test_a_parameter_outside_the_sharded_state_dict_is_named(llama: Path) -> None:
    model = spoiled(llama)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    whole = type(model).sharded_state_dict
    model.sharded_state_dict = lambda **options: {
        key: value for key, value in whole(model, **options).items() if key != "extra"
    }
    with pytest.raises(InputError, match=r"extra: expected 3 elements in sharded_state_dict\(\); found 0"):
        load(model, llama)


def test_a_copy_in_the_sharded_state_dict_is_no_place_to_load_into(llama: Path) -> None:
    model = spoiled(llama)
    norm = model.decoder.final_layernorm
    whole = type(model).sharded_state_dict

    def copied(**options: Any) -> dict[str, Any]:
        found = whole(model, **options)
        found["decoder.final_layernorm.weight"].data = norm.weight.detach().clone()
        return found

    model.sharded_state_dict = copied
    with pytest.raises(InputError, match=r"final_layernorm.weight: expected 72 elements"):
        load(model, llama)


def test_damage_is_found_by_verify_alone(llama: Path, own: Path) -> None:
    place = payload_place(own)
    with place[0].open("r+b") as file:
        file.seek(place[1])
        byte = file.read(1)[0]
        file.seek(place[1])
        file.write(bytes([byte ^ 1]))
    load(spoiled(llama), own)
    model = spoiled(llama)
    with pytest.raises(InputError, match=r"distcp.*CRC-32"):
        load(model, own, verify=True)
    assert_untouched(model)


def payload_place(folder: Path) -> tuple[Path, int]:
    """A byte in the middle of the embedding's first chunk."""
    chunk = transcoder.open_checkpoint(folder)["embedding.word_embeddings.weight"].chunks[0]
    return folder / chunk.file, chunk.offset + chunk.nbytes // 2


def test_a_truncated_checkpoint_names_file_and_tensor(llama: Path, own: Path) -> None:
    path = own / "__0_0.distcp"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 400)
    model = spoiled(llama)
    with pytest.raises(InputError, match=r"__0_0.distcp"):
        load(model, own)
    assert_untouched(model)


def test_a_truncated_shard_is_named(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "short")
    path = next(folder.glob("*00002-of*"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(InputError, match=path.name):
        load(spoiled(llama), folder)


def vision_model(folder: Path) -> Path:
    """A tiny Qwen2.5-VL as transformers saves it."""
    from test_vision_language import TEXT, VISION
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(5)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=VISION)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def test_a_language_model_is_filled_from_a_model_with_a_tower(tmp_path: Path) -> None:
    source = vision_model(tmp_path / "vl")
    transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)
    one, two = spoiled(source), spoiled(tmp_path / "mcore")
    load(one, source), load(two, tmp_path / "mcore")
    want = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(filled(one)["decoder.layers.1.mlp.linear_fc2.weight"], want)
    assert all(torch.equal(tensor, filled(two)[name]) for name, tensor in filled(one).items())
    assert one.position_embedding_type == "mrope" and one.config.mrope_section == [1, 1, 0]


def test_the_parts_of_a_pipeline_belong_to_their_stages() -> None:
    stored = ["embedding.w", "decoder.layers.0.a", "decoder.layers.1.a", "decoder.layers.1.b", "decoder.norm", "mtp.x"]
    used = {"decoder.layers.1.a"}
    assert unused(used, stored, used, first=False, last=False) == ["decoder.layers.1.b"]
    assert unused(used, stored, used, first=True, last=False) == ["embedding.w", "decoder.layers.1.b"]
    assert unused(used, stored, used, first=False, last=True) == ["decoder.layers.1.b", "decoder.norm", "mtp.x"]
