"""FP8, MXFP4 and INT4 sources: decoded as torch and transformers decode them, and given back bit for bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quantised as q
import torch
import zoo
from command_line import succeed, transcode
from zoo import read, read_config
from zoo_numbers import FP8_CONFIG, Tensors

import transcoder

LIKE = {"quantize": "like-source"}


@pytest.mark.parametrize("kind", q.KINDS)
def test_the_megatron_files_are_those_of_the_model_that_torch_decoded(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    grid = {"tp": 2, "pp": 2, "ep": 2}
    for number, (one, options) in enumerate([(checkpoints[kind], {}), (None, grid)]):
        first = one or q.imported(q.made(kind), tmp_path / f"a{number}", **options)
        second = q.imported(q.plain(kind), tmp_path / f"b{number}", **options)
        if kind in zoo.MXFP4_KINDS:  # its tensors have other names in BF16 files, so the files are in another order
            q.assert_equal(q.loaded(first), q.loaded(second))
        else:
            assert q.payloads(first) == q.payloads(second)


def test_the_kinds_have_partial_last_blocks_and_scales_of_every_rank() -> None:
    blocks, scalars = read(q.made("deepseek-v3-fp8")), read(q.made("kimi-k2-scalar"))
    assert any(blocks[name].shape[0] % 128 and blocks[name].shape[1] % 128 for name in q.quantised(blocks))
    assert {scalars[q.scale_name(name)].ndim for name in q.quantised(scalars)} == {0, 1, 2}
    assert len(q.quantised(read(q.made("kimi-k2-int4")))) == 24


@pytest.mark.parametrize("kind", q.KINDS)
def test_scales_in_another_shard_than_their_weights(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = read(q.made(kind))
    scales = {name: tensors.pop(name) for name in [q.scale_name(name) for name in q.quantised(tensors)]}
    shards = {"model-00001-of-00002.safetensors": scales, "model-00002-of-00002.safetensors": tensors}
    source = q.write_shards(tmp_path / "source", shards, read_config(q.made(kind)))
    first = q.imported(source, tmp_path / "mcore", workers=2)
    q.assert_equal(q.loaded(first), q.loaded(checkpoints[kind]))
    transcoder.mcore2hf(first, tmp_path / "back", sync=False, workers=2, **LIKE)
    assert q.contents(tmp_path / "back") == q.contents(source)


@pytest.mark.parametrize("kind", q.KINDS)
def test_an_export_is_in_bfloat16_unless_asked(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    transcoder.mcore2hf(checkpoints[kind], tmp_path / "back", sync=False)
    q.assert_equal(read(tmp_path / "back"), q.decoded(read(q.made(kind))))
    assert read_config(tmp_path / "back") == q.plain_config(q.made(kind))
    index = tmp_path / "back" / "model.safetensors.index.json"
    assert not index.exists() or json.loads(index.read_text())["weight_map"].keys() == read(tmp_path / "back").keys()


@pytest.mark.parametrize("kind", ["deepseek-v3-fp8", "gpt-oss-mxfp4"])
def test_transformers_loads_the_export(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    transcoder.mcore2hf(checkpoints[kind], tmp_path / "back", sync=False)
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not [name for name in info["unexpected_keys"] if not name.startswith("model.layers.2.")]
    model.save_pretrained(tmp_path / "again")
    known, saved = read(tmp_path / "back"), read(tmp_path / "again")
    assert saved and all(torch.equal(known[name].float(), tensor.float()) for name, tensor in saved.items())


def test_mxfp4_is_what_transformers_decodes_it_to(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    transcoder.mcore2hf(checkpoints["gpt-oss-mxfp4"], tmp_path / "back", sync=False)
    source, back = read(q.made("gpt-oss-mxfp4")), read(tmp_path / "back")
    assert not [name for name in back if name.endswith(("_blocks", "_scales"))]
    for name in q.quantised(source):
        wanted = convert_moe_packed_tensors(source[name], source[q.scale_name(name)])
        assert torch.equal(back[q.weight_name(name)], wanted), name


@pytest.mark.parametrize("kind", q.KINDS)
def test_the_files_come_back_through_a_checkpoint(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for number, options in enumerate([{}, {"hf_model": q.made(kind)}, {"workers": 3, "verify": True}]):
        report = transcoder.mcore2hf(checkpoints[kind], tmp_path / str(number), sync=False, **LIKE, **options)
        assert q.contents(tmp_path / str(number)) == q.contents(q.made(kind))
        assert not [text for text in report["warnings"] if "scale" in text]


@pytest.mark.parametrize("kind", q.KINDS)
def test_a_round_trip_gives_the_files_back(kind: str, tmp_path: Path) -> None:
    source = q.made(kind)
    assert all(row["matches"] for row in transcoder.roundtrip(source, tp=2)["verified"])
    transcoder.roundtrip(source, tmp_path / "memory", sync=False)
    assert q.contents(tmp_path / "memory" / source.name) == q.contents(source)


@pytest.mark.parametrize("kind", q.KINDS)
def test_a_round_trip_through_megatron_files(kind: str, tmp_path: Path) -> None:
    source = q.made(kind)
    transcoder.roundtrip(source, tmp_path / "out", megatron_save_path=tmp_path / "mcore", pp=2, sync=False)
    assert q.contents(tmp_path / "out" / source.name) == q.contents(source)
    transcoder.roundtrip(source, megatron_load_path=tmp_path / "mcore", sync=False)
    transcoder.roundtrip(source, megatron_save_path=tmp_path / "other", sync=False)
    assert (tmp_path / "other" / "iter_0000000" / ".metadata").exists()


@pytest.mark.parametrize("kind", q.KINDS)
def test_verify_compares_a_quantised_source_with_its_checkpoint(kind: str, checkpoints: dict[str, Path]) -> None:
    assert transcoder.verify(q.made(kind), checkpoints[kind])["differences"] == []
    assert transcoder.verify(checkpoints[kind], q.made(kind))["differences"] == []


@pytest.mark.parametrize("kind", q.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_that_of_the_decoded_model(kind: str, dtype: str, tmp_path: Path) -> None:
    first = q.imported(q.made(kind), tmp_path / "a", dtype=dtype, verify=True)
    found, wanted = q.loaded(first), q.loaded(q.imported(q.plain(kind), tmp_path / "b", dtype=dtype))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (
        {getattr(torch, dtype)}
        <= {tensor.dtype for tensor in found.values()}
        <= {
            getattr(torch, dtype),
            torch.float32,
        }
    )


@pytest.mark.parametrize("kind", q.KINDS)
def test_files_come_back_from_a_checkpoint_in_float32(kind: str, tmp_path: Path) -> None:
    first = q.imported(q.made(kind), tmp_path / "a", dtype="float32")
    transcoder.mcore2hf(first, tmp_path / "back", dtype="bfloat16", sync=False, **LIKE)
    assert q.contents(tmp_path / "back") == q.contents(q.made(kind))


# The commands


def test_the_commands_convert_a_quantised_model(tmp_path: Path) -> None:
    source = q.made("deepseek-v3-fp8")
    done = succeed("hf2mcore", source, tmp_path / "mcore", "--tp", 2, "--verify", "--no-sync", "--json")
    assert done.report["dtype"] == "bfloat16" and done.err == ""
    back = succeed("mcore2hf", tmp_path / "mcore", tmp_path / "back", "--quantize", "like-source", "--verify", "--json")
    assert back.report["status"] == "ok" and q.contents(tmp_path / "back") == q.contents(source)
    again = succeed("mcore2hf", tmp_path / "mcore", tmp_path / "plain", "--json")
    assert again.report["dtype"] == "bfloat16"
    q.assert_equal(read(tmp_path / "plain"), q.decoded(read(source)))
    refused = transcode("mcore2hf", tmp_path / "mcore", tmp_path / "no", "--quantize", "fp8", "--json")
    assert refused.code == 2 and not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["gpt-oss-mxfp4", "kimi-k2-int4"])
def test_the_commands_look_at_a_quantised_model(kind: str, checkpoints: dict[str, Path]) -> None:
    assert succeed("verify", q.made(kind), checkpoints[kind], "--json").report["differences"] == []
    assert succeed("check", q.made(kind), "--json").report["tensors"] == len(read(q.made(kind)))
    keys = {row["key"]: row["dtype"] for row in succeed("inspect", q.made(kind), "--json").report["keys"]}
    assert keys == {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in read(q.made(kind)).items()}


@pytest.mark.parametrize("kind", q.KINDS)
def test_a_checkpoint_of_a_quantised_model_is_whole(kind: str, checkpoints: dict[str, Path]) -> None:
    assert transcoder.check(checkpoints[kind])["checked"]["digests"] > 0
    assert transcoder.check(q.made(kind))["tensors"] == len(read(q.made(kind)))
    assert {row["key"] for row in transcoder.inspect(checkpoints[kind])["keys"]} == q.loaded(checkpoints[kind]).keys()


CODECS = {"deepseek-v3-fp8": "fp8", "gpt-oss-mxfp4": "mxfp4", "kimi-k2-int4": "int4", "kimi-k2-scalar": "fp8"}


@pytest.mark.parametrize("kind", CODECS)
def test_a_plan_names_the_codec_of_the_rules_that_decode(kind: str, checkpoints: dict[str, Path]) -> None:
    rows = transcoder.plan(q.made(kind)).table["rules"]
    stems = {re.sub(r"\.\d+\.", ".#.", q.weight_name(name)) for name in q.quantised(read(q.made(kind)))}
    for row in rows:
        sides = [re.sub(r"\{[^}]*\}", "#", text.split(" ")[0]) for text in row["source"]]
        decodes = any(side.removesuffix("_blocks").removesuffix("_packed") in stems for side in sides)
        assert (CODECS[kind] in row["codec"].lower()) == decodes, row["rule"]
    assert transcoder.plan(checkpoints[kind], **LIKE).table["rules"]
    total = sum(file["bytes"] for file in transcoder.plan(checkpoints[kind], **LIKE).table["files"])
    assert total == sum(path.stat().st_size for path in q.made(kind).glob("*.safetensors"))


# Memory

WATCHED = """
import sys, threading, time, transcoder
peak, done = 0, False
def watch():
    global peak
    while not done:
        rows = open("/proc/self/status").read().splitlines()
        peak = max(peak, next(int(row.split()[1]) for row in rows if row.startswith("RssAnon")))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[1] == "import":
    transcoder.hf2mcore(sys.argv[2], sys.argv[3], memory="16MiB", sync=False)
else:
    transcoder.mcore2hf(sys.argv[2], sys.argv[3], memory="16MiB", quantize="like-source", sync=False)
done = True
thread.join()
print(peak)
"""


def large_fp8(directory: Path) -> Path:
    """Llama with 150 MB of FP8 weights, among them one of 117 MB."""
    rows, hidden = 57344, 2048
    config = {"hidden_size": hidden, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 4, "vocab_size": 256, "rms_norm_eps": 1e-5, "model_type": "llama"}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    config |= {"intermediate_size": rows // 2, "quantization_config": FP8_CONFIG}
    layer, tensors = "model.layers.0.", Tensors()
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (512, hidden),
        "self_attn.v_proj": (512, hidden),
    }
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (rows // 2, hidden)}
    shapes |= {"mlp.up_proj": (rows // 2, hidden), "mlp.down_proj": (hidden, rows // 2)}
    for name, (count, columns) in shapes.items():
        codes = torch.arange(count * columns, dtype=torch.int32).remainder_(120).to(torch.uint8).reshape(count, columns)
        tensors[f"{layer}{name}.weight"] = codes.view(torch.float8_e4m3fn)
        tensors[f"{layer}{name}.weight_scale_inv"] = torch.rand(-(-count // 128), -(-columns // 128)) + 0.5
    for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.ones(256, hidden, dtype=torch.bfloat16)
    return q.write_shards(directory, {"model.safetensors": tensors}, config)


def test_memory_stays_within_what_the_documents_promise(tmp_path: Path) -> None:
    source = large_fp8(tmp_path / "source")
    assert (source / "model.safetensors").stat().st_size > 150e6
    for words in (["import", source, tmp_path / "mcore"], ["export", tmp_path / "mcore", tmp_path / "back"]):
        command = [sys.executable, "-c", WATCHED, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert int(done.stdout) << 10 < (16 + 96) << 20, words[0]
    wanted, found = source / "model.safetensors", tmp_path / "back" / "model.safetensors"
    assert found.read_bytes() == wanted.read_bytes()
