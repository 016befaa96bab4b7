"""Chunks of a plan that leave holes, overlap, or lie where they must not; and plans that are odd but right."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import DCP, FC1, QKV, Chunk, Entry, draft, size
from attacks.opcodes import Call, Name, New
from attacks.plans import BIG, WORDS, laid, reject
from attacks.zipping import saved, tensor_item


@reject(FC1)
def gap(bench: Bench) -> None:
    """A chunk is missing: other loaders hand out uninitialised memory."""
    plan = laid()
    plan.entries[FC1].chunks.pop()
    bench.rewrite(plan)


@reject(FC1)
def no_chunks(bench: Bench) -> None:
    """A tensor of no chunks."""
    plan = laid()
    plan.entries[FC1].chunks.clear()
    bench.rewrite(plan)


@reject(FC1)
def overlap(bench: Bench) -> None:
    """Two chunks for the same place; the volume is that of the tensor plus one chunk."""
    plan = laid()
    again = plan.entries[FC1].chunks[0]
    plan.entries[FC1].chunks.append(Chunk((0, 1, 0), (1, 47, 16), again.item, again.path, again.at, again.length))
    bench.rewrite(plan)


@reject(FC1)
def overlap_and_gap_of_equal_volume(bench: Bench) -> None:
    """The sum of the volumes is right, one half is there twice."""
    plan = laid()
    chunk = plan.entries[FC1].chunks[1]
    chunk.offsets = (0, 0, 0)
    bench.rewrite(plan)


@reject(FC1)
def overlap_by_one_row(bench: Bench) -> None:
    """Chunks of 25 and 23 rows, the second one row too early: volume right, one row twice, one never."""
    plan = draft()
    entry, payload = plan.entries[FC1], bytes(2 * 25 * 16)
    entry.chunks[0:1] = [Chunk((0, 0, 0), (1, 25, 16), tensor_item("bfloat16", (1, 25, 16), payload)),
                         Chunk((0, 24, 0), (1, 23, 16), tensor_item("bfloat16", (1, 23, 16), payload[: 2 * 23 * 16]))]  # fmt: skip
    plan.lay()
    bench.rewrite(plan)


@reject(FC1)
def chunk_outside(bench: Bench) -> None:
    """A chunk behind the tensor's end."""
    plan = laid()
    plan.entries[FC1].chunks[1].offsets = (2, 0, 0)
    bench.rewrite(plan)


@reject("")
def chunk_of_negative_offset(bench: Bench) -> None:
    """A chunk before the tensor's start."""
    plan = laid()
    plan.entries[FC1].chunks[1].offsets = (-1, 0, 0)
    bench.rewrite(plan)


@reject("")
def chunk_of_another_rank(bench: Bench) -> None:
    """A chunk of fewer dimensions."""
    plan = laid()
    plan.entries[FC1].chunks[1].offsets, plan.entries[FC1].chunks[1].sizes = (1, 0), (1, 768)
    bench.rewrite(plan)


@reject("")
def empty_chunk_beside(bench: Bench) -> None:
    """A chunk of size 0 at an absurd place."""
    plan = laid()
    plan.entries[FC1].chunks.append(Chunk((10**18, 0, 0), (0, 48, 16), b"", "__0_0.distcp", 0, 0))
    bench.rewrite(plan)


@reject("", "mcore2hf check inspect")
def hundred_thousand_unit_chunks_of_a_lie(bench: Bench) -> None:
    """A declared shape of 10**15 rows, and chunks that leave all of it open: no loop over the shape."""
    plan = laid()
    plan.entries["x"] = Entry((BIG, 1), [Chunk((n, 0), (1, 1), b"", "__0_0.distcp", 0, 0) for n in range(3000)])
    bench.rewrite(plan)


@reject(FC1)
def two_chunks_in_one_range(bench: Bench) -> None:
    """Both layers read the same item."""
    plan = laid()
    first, second = plan.entries[FC1].chunks
    second.at, second.length = first.at, first.length
    bench.rewrite(plan)


@reject(f"{FC1}|overlap|range")
def ranges_that_overlap(bench: Bench) -> None:
    """Items of two tensors overlap in their file."""
    plan = laid()
    other = plan.entries[QKV].chunks[0]
    plan.entries[FC1].chunks[0].at = other.at + 64
    bench.rewrite(plan)


def accept(commands: str = WORDS) -> Any:
    """A plan that is legal."""
    return attack("ok", "mcore", commands)


@accept()
def files_of_any_name(bench: Bench) -> None:
    """File names mean nothing."""
    plan = draft()
    for entry in plan.entries.values():
        for chunk in entry.chunks:
            chunk.path = "any name.bin"
    bench.rewrite(plan)


@accept()
def planner_and_storage_meta(bench: Bench) -> None:
    """The attributes that torch writes beside the two that matter, a path of another machine among them."""
    plan = draft()
    where = Call(Name("pathlib", "PosixPath"), ("/", "home", "somebody", "iter_0000000"))
    plan.attributes["storage_meta"] = New(Name(f"{DCP}.metadata", "StorageMeta"), {"checkpoint_id": where, "save_id": "0" * 32, "load_id": None, "modules": []})  # fmt: skip
    plan.attributes["version"] = "1.0.0"
    bench.rewrite(plan)


@accept()
def bytes_between_items(bench: Bench) -> None:
    """Items need not touch."""
    plan = draft()
    plan.files["__0_0.distcp"] = b"between"
    bench.rewrite(plan)


@accept()
def plan_of_an_older_class(bench: Bench) -> None:
    """megatron-core 0.15 calls the root MCoreMetadata."""
    plan = laid()
    data = plan.pickle().replace(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n")  # fmt: skip
    bench.rewrite(plan)
    (bench.folder / ".metadata").write_bytes(data)


@accept("mcore2hf check")
def object_that_is_a_gadget(bench: Bench) -> None:
    """An `_extra_state` whose pickle is hostile is never opened."""
    from attacks.pickles import SHELL

    plan = draft()
    plan.objects["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"] = saved(
        [Call(Name("os", "system"), (SHELL,))]
    )
    bench.rewrite(plan)
    assert size((1,)) == Call(Name("torch", "Size"), ((1,),))


@accept("mcore2hf inspect")
def optimizer_beside_the_weights(bench: Bench) -> None:
    """Optimizer tensors are ignored."""
    plan = draft()
    plan.entries["optimizer.state.exp_avg.x"] = Entry(
        (2,), [Chunk((0,), (2,), tensor_item("float32", (2,), bytes(8)))], "float32"
    )
    bench.rewrite(plan)
