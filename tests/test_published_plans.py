"""Conversions of published models, planned from their true configurations and headers: counts, bytes, files, memory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
from hollow import measure, write_sparse
from published import BYTES, RELEASES, config_of, stored, tensors, weights

import transcoder
from transcoder.description import Plan  # with all that it imports, so that planning reads no more modules
from transcoder.importing import ImportPlan

MEMORY_LIMIT = 300 << 20  # bytes
MODULES = 1 << 20  # bytes: what planning may still read besides the checkpoint
LARGEST = "DeepSeek-V3"

# The grid and how many ranks it takes: every pipeline stage has tp ranks, times the smallest number that makes ep fit.
GRIDS: dict[str, tuple[dict[str, int], int]] = {
    "Qwen3-30B-A3B": ({"tp": 4, "pp": 2, "ep": 8}, 16),
    "Qwen3-235B-A22B": ({"tp": 8, "pp": 8, "ep": 16}, 128),
    "Mixtral-8x7B-v0.1": ({"tp": 2, "pp": 4, "ep": 8}, 32),
    "DeepSeek-V3": ({"tp": 8, "pp": 16, "ep": 32}, 512),
    "Kimi-K2-Instruct": ({"tp": 8, "pp": 16, "ep": 32}, 512),
    "GLM-4.5": ({"tp": 8, "pp": 8, "ep": 16}, 128),
    "gpt-oss-20b": ({"tp": 4, "pp": 2, "ep": 8}, 16),
    "gpt-oss-20b-BF16": ({"tp": 8, "pp": 3, "ep": 4}, 24),
    "gpt-oss-120b": ({"tp": 8, "pp": 4, "ep": 16}, 64),
    "Qwen2.5-VL-3B-Instruct": ({"tp": 2, "pp": 2}, 4),
    "Qwen2.5-VL-7B-Instruct": ({"tp": 4, "pp": 2}, 8),
    "Qwen2.5-VL-72B-Instruct": ({"tp": 8, "pp": 4}, 32),
}

# One stored tensor of each, as Megatron's own checkpoint of the model would have it.
EXAMPLES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "Qwen3-30B-A3B": ("decoder.layers.mlp.experts.experts.linear_fc1.weight", "BF16", (48, 128, 1536, 2048)),
    "Qwen3-235B-A22B": ("decoder.layers.self_attention.linear_qkv.weight", "BF16", (94, 9216, 4096)),
    "Mixtral-8x7B-v0.1": ("decoder.layers.mlp.experts.experts.linear_fc2.weight", "BF16", (32, 8, 4096, 14336)),
    "DeepSeek-V3": ("mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight", "BF16", (256, 4096, 7168)),
    "Kimi-K2-Instruct": ("decoder.layers.60.mlp.router.expert_bias", "F32", (384,)),
    "GLM-4.5": ("mtp.layers.0.transformer_layer.self_attention.linear_qkv.bias", "BF16", (14336,)),
    "gpt-oss-20b": ("embedding.word_embeddings.weight", "BF16", (201216, 2880)),
    "gpt-oss-20b-BF16": ("output_layer.weight", "BF16", (201728, 2880)),
    "gpt-oss-120b": ("output_layer.weight", "BF16", (201728, 2880)),
    "Qwen2.5-VL-3B-Instruct": ("language_model.decoder.layers.self_attention.linear_qkv.bias", "BF16", (36, 2560)),
    "Qwen2.5-VL-7B-Instruct": ("language_model.decoder.layers.mlp.linear_fc1.weight", "BF16", (28, 37888, 3584)),
    "Qwen2.5-VL-72B-Instruct": ("visual.merger.mlp.2.weight", "BF16", (8192, 5120)),
}


@dataclass(frozen=True)
class Case:
    """A model's hollow files, the plan of their import, and the bytes that were read for it."""

    name: str
    folder: Path
    headers: int
    plan: Plan
    read: int

    @property
    def work(self) -> ImportPlan:
        """The plan of the import."""
        assert isinstance(self.plan.work, ImportPlan)
        return self.plan.work

    @property
    def chunks(self) -> int:
        """Bytes of all payloads in the Megatron files."""
        return sum(chunk.nbytes for spec in self.work.placement.catalog.values() for chunk in spec.chunks)


def bytes_read() -> int:
    """What this process has read from files so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


@pytest.fixture(scope="module", params=RELEASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Each published model in turn, on its grid."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    headers = write_sparse(config_of(name), folder, RELEASES[name].files)
    before = bytes_read()
    plan = transcoder.plan(folder, **GRIDS[name][0])
    yield Case(name, folder, headers, plan, bytes_read() - before)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", RELEASES)
def test_the_files_of_these_tests_are_those_that_were_published(name: str) -> None:
    release, listed = RELEASES[name], list(tensors(config_of(name)))
    elements = Counter[str]()
    for _, dtype, shape in listed:
        elements[dtype] += prod(shape)
    assert elements == release.elements
    assert len({tensor[0] for tensor in listed}) == len(listed) == release.tensors
    assert sum(prod(shape) for _, _, shape in weights(config_of(name))) == release.parameters


def test_the_plan_has_every_weight_of_the_files(case: Case) -> None:
    config, release = config_of(case.name), RELEASES[case.name]
    expected = {name: shape for name, _, shape in weights(config)}
    assert {name: tensor.shape for name, tensor in case.work.model.hf.items()} == expected
    assert len(case.work.source.catalog) == release.tensors
    assert sum(spec.nbytes for spec in case.work.source.catalog.values()) == release.size
    report = case.plan.report
    assert (report["tensors"], report["parameters"]) == (len(expected), release.parameters)
    assert (report["dtype"], report["architecture"]) == ("bfloat16", config["architectures"][0])


def test_megatron_stores_every_weight_once(case: Case) -> None:
    config, tp = config_of(case.name), case.work.mesh.tp
    expected = stored(config, padding=-config["vocab_size"] % (128 * tp))
    found = Counter[str]()
    for spec in case.work.placement.catalog.values():
        found[spec.dtype.safetensors] += prod(spec.shape)
    assert found == expected
    assert case.chunks == sum(BYTES[dtype] * count for dtype, count in expected.items())
    key, dtype, shape = EXAMPLES[case.name]
    example = case.work.placement.catalog[key]
    assert (example.dtype.safetensors, example.shape) == (dtype, shape)


def test_the_megatron_files_hold_their_items_end_to_end(case: Case) -> None:
    placement = case.work.placement
    ends = dict.fromkeys(placement.sizes, 0) | {"__0_0.distcp": len(placement.blob)}
    items = sorted(placement.item(spec, chunk) for spec, chunk in placement.chunks())
    for file, offset, length in items:
        assert offset == ends[file]
        ends[file] += length
    assert ends == placement.sizes
    assert {file: 0 for rank in range(GRIDS[case.name][1]) for file in files_of(rank)}.keys() == ends.keys()
    files = {row["name"].split("/")[1]: row["bytes"] for row in case.plan.table["files"]}
    assert files == ends
    assert case.chunks < sum(ends.values()) < case.chunks + 2048 * (len(items) + 1)


def files_of(rank: int) -> tuple[str, str]:
    """The two files of a rank."""
    return f"__{rank}_0.distcp", f"__{rank}_1.distcp"


def test_planning_reads_headers_and_no_payload(case: Case) -> None:
    small = sum((case.folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    assert case.headers < case.read < case.headers + 2 * small + MODULES
    used = sum((case.folder / name).stat().st_blocks * 512 for name in RELEASES[case.name].files)
    assert used < case.headers + 16384 * RELEASES[case.name].shards


def test_the_largest_grid_is_planned_within_the_memory_limit(tmp_path: Path) -> None:
    write_sparse(config_of(LARGEST), tmp_path, RELEASES[LARGEST].files)
    cost = measure(tmp_path, GRIDS[LARGEST][0])
    assert cost["tensors"] == len(list(weights(config_of(LARGEST))))
    assert cost["size"] > 100 * cost["chunks"]
    assert cost["peak"] < MEMORY_LIMIT
