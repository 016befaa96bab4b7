"""A plan (`.metadata`) that lies about a tensor is refused, where megatron-core would load holes or other numbers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import MANIFEST, hf_names, load, refusal, store, tensors
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

Edit = Callable[[Metadata, str], None]


def drop_chunk(plan: Metadata, key: str) -> None:
    chunk = tensors(plan)[key].chunks.pop()
    plan.storage_data = {i: info for i, info in plan.storage_data.items() if (i.fqn, i.offset) != (key, chunk.offsets)}


def drop_chunk_alone(plan: Metadata, key: str) -> None:
    tensors(plan)[key].chunks.pop()


def repeat_chunk(plan: Metadata, key: str) -> None:
    tensors(plan)[key].chunks.append(tensors(plan)[key].chunks[0])


def move_chunk(plan: Metadata, key: str) -> None:
    chunk = tensors(plan)[key].chunks[-1]
    moved = torch.Size([chunk.offsets[0] + 1, *chunk.offsets[1:]])
    tensors(plan)[key].chunks[-1] = ChunkStorageMetadata(offsets=moved, sizes=chunk.sizes)
    info = plan.storage_data.pop(MetadataIndex(key, chunk.offsets))
    plan.storage_data[MetadataIndex(key, moved)] = info


def shrink_chunk(plan: Metadata, key: str) -> None:
    chunk = tensors(plan)[key].chunks[0]
    sizes = torch.Size([*chunk.sizes[:-1], chunk.sizes[-1] - 1])
    tensors(plan)[key].chunks[0] = ChunkStorageMetadata(offsets=chunk.offsets, sizes=sizes)


def grow_chunk(plan: Metadata, key: str) -> None:
    chunk = tensors(plan)[key].chunks[0]
    sizes = torch.Size([*chunk.sizes[:-1], chunk.sizes[-1] + 1])
    tensors(plan)[key].chunks[0] = ChunkStorageMetadata(offsets=chunk.offsets, sizes=sizes)


def add_rank(plan: Metadata, key: str) -> None:
    tensors(plan)[key].size = torch.Size([*tensors(plan)[key].size, 1])


def float16(plan: Metadata, key: str) -> None:
    tensors(plan)[key].properties.dtype = torch.float16


def float32(plan: Metadata, key: str) -> None:
    tensors(plan)[key].properties.dtype = torch.float32


def int16(plan: Metadata, key: str) -> None:
    tensors(plan)[key].properties.dtype = torch.int16


def larger(plan: Metadata, key: str) -> None:
    size = tensors(plan)[key].size
    tensors(plan)[key].size = torch.Size([size[0] + 1, *size[1:]])


def smaller(plan: Metadata, key: str) -> None:
    size = tensors(plan)[key].size
    tensors(plan)[key].size = torch.Size([*size[:-1], size[-1] - 1])


def enormous(plan: Metadata, key: str) -> None:
    tensors(plan)[key].size = torch.Size([1 << 50, *tensors(plan)[key].size[1:]])


def drop_key(plan: Metadata, key: str) -> None:
    del plan.state_dict_metadata[key]
    plan.storage_data = {index: info for index, info in plan.storage_data.items() if index.fqn != key}


def drop_key_alone(plan: Metadata, key: str) -> None:
    del plan.state_dict_metadata[key]


def drop_places(plan: Metadata, key: str) -> None:
    plan.storage_data = {index: info for index, info in plan.storage_data.items() if index.fqn != key}


def rename_key(plan: Metadata, key: str) -> None:
    plan.state_dict_metadata = {name + "x" * (name == key): row for name, row in plan.state_dict_metadata.items()}
    places = plan.storage_data.items()
    plan.storage_data = {MetadataIndex(i.fqn + "x" * (i.fqn == key), i.offset, i.index): info for i, info in places}


def _first(plan: Metadata, key: str) -> Any:
    return next(info for index, info in plan.storage_data.items() if index.fqn == key)


def short_item(plan: Metadata, key: str) -> None:
    _first(plan, key).length -= 1


def long_item(plan: Metadata, key: str) -> None:
    _first(plan, key).length += 1


def far_item(plan: Metadata, key: str) -> None:
    _first(plan, key).offset += 1 << 40


def negative_item(plan: Metadata, key: str) -> None:
    _first(plan, key).offset = -1


def item_above(plan: Metadata, key: str) -> None:
    _first(plan, key).relative_path = f"../iter_0000000/{_first(plan, key).relative_path}"


def item_elsewhere(plan: Metadata, key: str) -> None:
    _first(plan, key).relative_path = "/dev/zero"


def item_in_no_file(plan: Metadata, key: str) -> None:
    _first(plan, key).relative_path = "__9_9.distcp"


EDITS: tuple[Edit, ...] = (
    drop_chunk, drop_chunk_alone, repeat_chunk, move_chunk, shrink_chunk, grow_chunk, add_rank, float16, float32, int16,
    larger, smaller, enormous, drop_key, drop_key_alone, drop_places, rename_key, short_item, long_item, far_item,
    negative_item, item_above, item_elsewhere, item_in_no_file,
)  # fmt: skip


IN_FILES = (short_item, long_item, far_item, item_in_no_file)
IN_PLACES = (negative_item, item_above, item_elsewhere)


@pytest.mark.parametrize("edit", EDITS)
def test_a_plan_that_lies_about_one_tensor_is_refused_by_name(folder: Path, edit: Edit) -> None:
    original = (folder / ".metadata").read_bytes()
    keys = list(tensors(load(folder)))
    assert len(keys) == 9
    for key in keys:
        (folder / ".metadata").write_bytes(original)
        plan = load(folder)
        edit(plan, key)
        store(folder, plan)
        file = [_first(plan, key).relative_path] if edit in IN_FILES else [".metadata"] if edit in IN_PLACES else []
        refusal(folder, key, *file)


def test_two_tensors_that_share_one_place_are_refused_by_name(folder: Path) -> None:
    plan, norms = load(folder), ("mlp.linear_fc1.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight")
    one, two = (f"decoder.layers.{name}" for name in norms)
    for chunk in tensors(plan)[one].chunks:
        plan.storage_data[MetadataIndex(two, chunk.offsets)] = plan.storage_data[MetadataIndex(one, chunk.offsets)]
    store(folder, plan)
    refusal(folder, one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.float32])
def test_a_plan_whose_tensors_all_have_another_dtype_is_refused(folder: Path, dtype: torch.dtype) -> None:
    plan = load(folder)
    for row in tensors(plan).values():
        row.properties.dtype = dtype
    store(folder, plan)
    refusal(folder, *tensors(plan))


def test_chunk_borders_that_are_not_those_of_the_items_are_refused_by_name(folder: Path) -> None:
    plan, key = load(folder), "embedding.word_embeddings.weight"
    one, two = tensors(plan)[key].chunks
    moved = torch.Size([two.offsets[0] - 1, *two.offsets[1:]])
    plan.storage_data[MetadataIndex(key, moved)] = plan.storage_data.pop(MetadataIndex(key, two.offsets))
    one.sizes = torch.Size([one.sizes[0] - 1, *one.sizes[1:]])
    two.offsets, two.sizes = moved, torch.Size([two.sizes[0] + 1, *two.sizes[1:]])
    store(folder, plan)
    refusal(folder, key)


def test_an_unknown_tensor_is_refused_by_name(folder: Path) -> None:
    original = (folder / ".metadata").read_bytes()
    for key, row in tensors(pickle.loads(original)).items():
        plan, extra = pickle.loads(original), f"{key}_scale"
        plan.state_dict_metadata[extra] = row
        copies = [(index.offset, info) for index, info in plan.storage_data.items() if index.fqn == key]
        plan.storage_data |= {MetadataIndex(extra, offset): _copied(folder, info) for offset, info in copies}
        store(folder, plan)
        refusal(folder, extra)


def _copied(folder: Path, info: Any) -> Any:
    path = folder / info.relative_path
    data = path.read_bytes()
    path.write_bytes(data + data[info.offset : info.offset + info.length])
    return type(info)(info.relative_path, len(data), info.length)


def test_chunks_that_changed_places_are_refused_by_the_manifest(good: Path, folder: Path) -> None:
    manifest, count = (folder / MANIFEST).read_bytes(), 0
    original = (folder / ".metadata").read_bytes()
    for key, row in tensors(load(folder)).items():
        one, two = (MetadataIndex(key, chunk.offsets) for chunk in (row.chunks[0], row.chunks[-1]))
        if one.offset != two.offset and row.chunks[0].sizes == row.chunks[-1].sizes:
            plan = pickle.loads(original)
            plan.storage_data[one], plan.storage_data[two] = plan.storage_data[two], plan.storage_data[one]
            store(folder, plan)
            (folder / MANIFEST).write_bytes(manifest)
            refusal(folder, ".metadata", *hf_names(good))
            count += 1
    assert count >= 7


@pytest.mark.parametrize("root", [{}, [], b"", None, "Metadata", torch.Size([1]), Metadata({}, None, {})])
def test_a_plan_that_is_something_else_is_refused(folder: Path, root: Any) -> None:
    store(folder, root)
    assert refusal(folder, ".metadata", "embedding.word_embeddings.weight", "dialect").problems is not None


def test_chunks_that_share_one_place_are_refused_by_name(folder: Path) -> None:
    original, count = (folder / ".metadata").read_bytes(), 0
    for key, row in tensors(pickle.loads(original)).items():
        plan, (one, two) = pickle.loads(original), (row.chunks[0], row.chunks[-1])
        if one.sizes == two.sizes and one.offsets != two.offsets:
            info = plan.storage_data[MetadataIndex(key, one.offsets)]
            plan.storage_data[MetadataIndex(key, two.offsets)] = info
            store(folder, plan)
            refusal(folder, key)
            count += 1
    assert count >= 7
