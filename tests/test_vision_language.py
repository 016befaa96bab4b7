"""Qwen2.5-VL: what transformers saves comes back, whichever prefix it has, and the whole vision tower is proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import Entry, read_files, write_files

import transcoder
from transcoder import InputError

TEXT = {
    "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 30, "vocab_size": 67, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6},
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 22, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as transformers saves it, in several shards."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(5)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=request.param)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("vl") / "hf"
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def renamed(source: Path, directory: Path) -> Path:
    """The same model under the newer prefixes."""
    shutil.copytree(source, directory)
    files = {
        file: [Entry(_newer(e.name), e.dtype, e.shape, e.data) for e in entries]
        for file, entries in read_files(source).items()
    }
    write_files(directory, files)
    return directory


def _newer(name: str) -> str:
    if name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return f"model.{name}" if name.startswith("visual.") else name


@pytest.mark.parametrize("grid", [{"tp": 1}, {"tp": 2, "pp": 2}, {"pp": 3, "layout": "singleton"}])
def test_both_prefixes_give_the_same_checkpoint_and_come_back(
    source: Path, grid: dict[str, int], tmp_path: Path
) -> None:
    new = renamed(source, tmp_path / "new")
    for name, files in (("old", source), ("new", new)):
        transcoder.hf2mcore(files, tmp_path / f"m-{name}", sync=False, **grid)
        transcoder.mcore2hf(tmp_path / f"m-{name}", tmp_path / f"h-{name}", sync=False)
        for path in files.iterdir():
            assert (tmp_path / f"h-{name}" / path.name).read_bytes() == path.read_bytes(), path.name
    for path in (tmp_path / "m-old" / "iter_0000000").glob("*.distcp"):
        assert (tmp_path / "m-new" / "iter_0000000" / path.name).read_bytes() == path.read_bytes()


def test_an_export_follows_the_prefix_of_the_model_it_is_given(source: Path, tmp_path: Path) -> None:
    new = renamed(source, tmp_path / "new")
    transcoder.hf2mcore(source, tmp_path / "m", sync=False)
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "h", hf_model=new, sync=False)
    for path in new.glob("*.safetensors"):
        assert (tmp_path / "h" / path.name).read_bytes() == path.read_bytes(), path.name


def test_megatron_keys_have_the_prefixes_of_megatron_bridge(source: Path, tmp_path: Path) -> None:
    transcoder.hf2mcore(source, tmp_path / "m", sync=False)
    rows = {row["key"]: row["shape"] for row in transcoder.inspect(tmp_path / "m")["keys"]}
    assert rows["language_model.decoder.layers.mlp.linear_fc1.weight"] == [3, 60, 24]
    assert rows["visual.blocks.0.attn.qkv.weight"] == [48, 16]
    assert rows["visual.patch_embed.proj.weight"] == [16, 3, 2, 4, 4]
    assert all(key.startswith(("language_model.", "visual.")) for key in rows)


def test_every_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    files = read_files(source)
    names = [entry.name for entries in files.values() for entry in entries]
    assert sum(name.startswith("visual.") for name in names) == 30
    for gone in names:
        damaged = tmp_path / "damaged"
        shutil.copytree(source, damaged)
        write_files(damaged, {file: [e for e in entries if e.name != gone] for file, entries in files.items()})
        with pytest.raises(InputError) as caught:
            transcoder.hf2mcore(damaged, tmp_path / "m", sync=False)
        assert gone in str(caught.value), gone
        shutil.rmtree(damaged)
    assert not (tmp_path / "m").exists()


def test_the_tie_is_read_at_the_top_of_the_config(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    wrong = shutil.copytree(source, tmp_path / "wrong")
    (wrong / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": not config["tie_word_embeddings"]}))
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        transcoder.hf2mcore(wrong, tmp_path / "m")
