"""Models of the runtime: grids that fit, both spellings of a config, classes that it knows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder import InputError, UsageError

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from models import make_model, read_config

from transcoder.mesh import Mesh
from transcoder.runtime.load import load
from transcoder.runtime.model import build, build_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("build") / "llama")


BAD_GRIDS = {
    "heads": ({"tp": 5}, "--tp 5 does not divide the 12 attention heads"),
    "layers": ({"pp": 3}, "--pp 3 does not divide the 4 layers"),
    "experts": ({"ep": 2}, "this model has no experts"),
    "processes": ({"tp": 2}, "this grid needs 2 processes or a multiple, there are 1; start with torchrun"),
    "nothing": ({"tp": 0}, "--tp 0: give a number of 1 or more"),
    "dtype": ({"dtype": "int8"}, "--dtype int8: give float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_grid_that_does_not_fit_is_a_usage_error(llama: Path, name: str) -> None:
    options, message = BAD_GRIDS[name]
    with pytest.raises(UsageError, match=message):
        build(llama, device="cpu", **options)


def test_a_class_that_the_runtime_does_not_know_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*found .*MambaForCausalLM"):
        build(read_config(llama) | {"architectures": ["MambaForCausalLM"]})


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 wrote it."""
    found = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    found["rope_theta"], found["torch_dtype"] = rope.pop("rope_theta"), config["dtype"]
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    if "num_local_experts" in found and config["model_type"] != "mixtral":
        found["num_experts"] = found.pop("num_local_experts")
    return found


@pytest.mark.parametrize("kind", ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "mixtral", "qwen2-moe", "olmoe"))
def test_both_spellings_of_a_config_give_one_model(tmp_path: Path, kind: str) -> None:
    config = read_config(make_model(kind, tmp_path / kind))
    new, old = build_model(config, Mesh()), build_model(older(config), Mesh())
    fields = {name: value for name, value in vars(new.config).items() if not callable(value)}
    assert len(fields) > 100 and fields == {name: vars(old.config)[name] for name in fields}
    assert torch.equal(new.rotary_pos_emb.inv_freq, old.rotary_pos_emb.inv_freq)
    assert new.share_embeddings_and_output_weights == old.share_embeddings_and_output_weights
    assert older(config) != config


def test_links_out_of_the_directory_are_followed_on_request_alone(llama: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in llama.iterdir():
        if file.suffix == ".safetensors":
            (linked / file.name).symlink_to(file)
        else:
            shutil.copy(file, linked)
    one, two = build(llama, device="cpu"), build(linked, device="cpu")
    with pytest.raises(InputError, match="a link that leads outside"):
        load(two, linked)
    load(one, llama), load(two, linked, follow_links=True)
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert pairs and all(torch.equal(left, right) for left, right in pairs)
