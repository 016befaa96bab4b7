"""`.metadata` that is a good pickle and a lie: paths, ranges, chunks, shapes, dtypes."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import EMBEDDING, FC1, QKV, Chunk, Draft, Entry, draft, index, info
from attacks.opcodes import Call, Name
from attacks.zipping import tensor_item

WORDS = "mcore2hf inspect"
BIG = 10**15


def laid() -> Draft:
    """A draft whose places are known, so that a lie does not move them."""
    plan = draft()
    plan.lay()
    return plan


def reject(needle: str = "", commands: str = WORDS) -> Any:
    """A plan that must be refused."""
    return attack("reject", "mcore", commands, needle)


PATHS: dict[str, Any] = {
    "parent": "../outside/__0_0.distcp", "above_all": "../../../../../../../../etc/hostname", "absolute": "/etc/hostname",
    "dot": ".", "empty": "", "nul": "__0_0.distcp\0.txt", "into_a_folder": "hf/config.json", "backslash": "..\\x.distcp",
    "number": 0, "none": None, "bytes": b"__0_0.distcp", "list": ["__0_0.distcp"], "metadata_itself": ".metadata",
    "missing": "__9_9.distcp", "case": "__0_0.DISTCP", "hidden_parent": "./__0_0.distcp", "long": "x" * 5000,
    "device": "/dev/zero", "url": "http://127.0.0.1:9/x", "home": "~/x.distcp", "variable": "$HOME/x.distcp",
    "pathlib": Call(Name("pathlib", "PosixPath"), ("/", "etc", "hostname")),
}  # fmt: skip
ABSENT = (
    "into_a_folder",
    "metadata_itself",
    "missing",
    "case",
    "long",
    "home",
    "variable",
)  # plain names, no such items
PLACES: dict[str, tuple[Any, Any]] = {
    "offset_past_the_end": (BIG, None), "offset_negative": (-100, None), "offset_float": (0.0, None),
    "offset_true": (True, None), "offset_text": ("0", None), "offset_none": (None, None), "offset_of_200_bytes": (2**1600, None),
    "length_past_the_end": (None, BIG), "length_zero": (None, 0), "length_negative": (None, -1), "length_one_short": (None, -2),
    "length_float": (None, 100.0), "length_none": (None, "none"), "length_too_long_by_one": (None, -3),
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "huge": (10**12, 48, 16), "overflow": (2**62, 4, 2), "wraps_to_the_right_count": (2**64 + 2, 48, 16), "negative": (-2, -48, 16),
    "zero": (0, 48, 16), "float": (2.0, 48, 16), "true": (True, 96, 16), "text": ("2", 48, 16), "none": None,
    "scalar": (), "rank_2": (96, 16), "rank_100000": (1,) * 100_000, "one_layer_more": (3, 48, 16), "one_row_less": (2, 47, 16),
    "swapped": (2, 16, 48), "number_of_200_bytes": (2**1600, 48, 16),
}  # fmt: skip


def _enter_paths() -> None:
    for word, value in PATHS.items():

        def build(bench: Bench, value: Any = value) -> None:
            plan = laid()
            (bench.outside / "__0_0.distcp").write_bytes(plan.files["__0_0.distcp"])
            plan.entries[FC1].chunks[0].path = value
            bench.rewrite(plan)

        build.__name__, build.__doc__ = f"path_{word}", f"An item's file: {word.replace('_', ' ')}."
        reject("", "mcore2hf check verify plan" if word in ABSENT else WORDS)(build)


def _enter_places() -> None:
    for word, (offset, length) in PLACES.items():

        def build(bench: Bench, offset: Any = offset, length: Any = length, word: str = word) -> None:
            plan = laid()
            chunk = plan.entries[FC1].chunks[0]
            near = {-2: chunk.length - 1, -3: chunk.length + 1, "none": None}
            chunk.at = offset if word.startswith("offset") else chunk.at
            chunk.length = near.get(length, length) if word.startswith("length") else chunk.length
            bench.rewrite(plan)

        build.__name__, build.__doc__ = f"place_{word}", f"An item's range: {word.replace('_', ' ')}."
        plain = word in (
            "length_one_short",
            "length_too_long_by_one",
            "offset_past_the_end",
            "length_past_the_end",
            "length_zero",
        )
        commands = "mcore2hf check verify" if plain else WORDS
        reject("", commands)(build)


def _enter_shapes() -> None:
    for word, value in SHAPES.items():

        def build(bench: Bench, value: Any = value) -> None:
            plan = laid()
            plan.entries[FC1].shape = value
            bench.rewrite(plan)

        build.__name__, build.__doc__ = f"shape_{word}", f"A tensor's declared shape: {word.replace('_', ' ')}."
        reject("")(build)


_enter_paths()
_enter_places()
_enter_shapes()


@reject("")
def chunk_without_item(bench: Bench) -> None:
    """A chunk that `storage_data` does not place."""
    plan = laid()
    moved = plan.entries[FC1].chunks[1]
    data = plan.pickle()
    bench.rewrite(plan)
    changed = data.replace(index(FC1, moved.offsets).state["fqn"].encode(), b"x" * len(FC1))
    parts = data.rpartition(FC1.encode())
    (bench.folder / ".metadata").write_bytes(parts[0] + b"x" * len(FC1) + parts[2])
    assert changed != data


@reject("")
def item_without_chunk(bench: Bench) -> None:
    """`storage_data` places a chunk that no tensor has."""
    plan = laid()
    plan.more_storage.append((index(FC1, (7, 0, 0)), info("__0_0.distcp", 0, 10)))
    bench.rewrite(plan)


@reject("")
def item_of_an_unknown_tensor(bench: Bench) -> None:
    """`storage_data` places a tensor that the plan does not have."""
    plan = laid()
    plan.more_storage.append((index("ghost", (0,)), info("__0_0.distcp", 0, 10)))
    bench.rewrite(plan)


@reject("")
def one_chunk_placed_twice(bench: Bench) -> None:
    """Two places for one chunk: readers differ in which they take."""
    plan = laid()
    other = plan.entries[QKV].chunks[0]
    plan.more_storage.append((index(FC1, (0, 0, 0)), info(other.path, other.at, other.length)))
    bench.rewrite(plan)


@reject("")
def one_tensor_declared_twice(bench: Bench) -> None:
    """Two declarations of one key."""
    plan = laid()
    plan.more_state.append((FC1, plan._tensor(Entry((1, 48, 16), []))))
    bench.rewrite(plan)


@reject("")
def key_is_a_number(bench: Bench) -> None:
    """A tensor's key that is no text."""
    plan = laid()
    plan.more_state.append((7, plan._tensor(Entry((0,), []))))
    bench.rewrite(plan)


@reject("")
def key_is_a_record(bench: Bench) -> None:
    """A tensor's key that is a call."""
    plan = laid()
    plan.more_state.append((Call(Name("torch", "Size"), ((1,),)), plan._tensor(Entry((0,), []))))
    bench.rewrite(plan)


@reject("")
def index_is_text(bench: Bench) -> None:
    """A place whose key is text, not a MetadataIndex."""
    plan = laid()
    plan.more_storage.append((FC1, info("__0_0.distcp", 0, 10)))
    bench.rewrite(plan)


@reject("")
def tensor_is_an_index(bench: Bench) -> None:
    """A record of the wrong class where a tensor is declared."""
    plan = laid()
    plan.more_state.append(("x", index("x", (0,))))
    bench.rewrite(plan)


@reject("")
def place_is_a_tuple(bench: Bench) -> None:
    """A record of no class where a place is wanted."""
    plan = laid()
    plan.more_storage.append((index("x", (0,)), ("__0_0.distcp", 0, 10)))
    bench.rewrite(plan)


@reject("transform|compress")
def compressed_by_a_transform(bench: Bench) -> None:
    """A stream transform would have to be undone."""
    plan = laid()
    plan.entries[FC1].chunks[0].transform = ["zstd"]
    bench.rewrite(plan)


@reject("", "mcore2hf check verify")
def dtype_of_other_size(bench: Bench) -> None:
    """float32 is declared, bfloat16 stored."""
    plan = laid()
    plan.entries[FC1].dtype = "float32"
    bench.rewrite(plan)


@reject("", "mcore2hf check verify")
def dtype_of_equal_size(bench: Bench) -> None:
    """float16 is declared, bfloat16 stored: only the item knows."""
    plan = laid()
    plan.entries[FC1].dtype = "float16"
    bench.rewrite(plan)


@reject("")
def dtype_unknown(bench: Bench) -> None:
    """A dtype that torch does not have."""
    plan = laid()
    plan.entries[FC1].dtype = "bfloat17"
    bench.rewrite(plan)


@reject("")
def dtype_that_is_a_function(bench: Bench) -> None:
    """A name of torch's that is no dtype."""
    plan = laid()
    plan.entries[FC1].dtype = "load"
    bench.rewrite(plan)


@reject("", "mcore2hf verify plan")
def extra_tensor(bench: Bench) -> None:
    """A tensor that no rule knows would be dropped without a word."""
    plan = draft()
    plan.entries["decoder.extra.weight"] = Entry((2,), [Chunk((0,), (2,), tensor_item("bfloat16", (2,), bytes(4)))])
    plan.lay()
    bench.rewrite(plan)


@reject("", "mcore2hf plan verify")
def missing_tensor(bench: Bench) -> None:
    """A tensor is not there."""
    plan = draft()
    del plan.entries[EMBEDDING]
    plan.lay()
    bench.rewrite(plan)


@reject("", "mcore2hf verify plan")
def sharded_object_where_a_tensor_is_wanted(bench: Bench) -> None:
    """A weight that is declared as bytes, which only unpickling would read."""
    plan = draft()
    item = plan.entries.pop(EMBEDDING).chunks[0].item
    plan.objects[EMBEDDING] = item
    plan.lay()
    bench.rewrite(plan)
