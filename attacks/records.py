"""What is inside an item: the pickled tensor, its storage and byte order; and items that are odd but right."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from attacks.archives import COUNT, WORDS, payload_of, put, records
from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import FC1, draft
from attacks.opcodes import Call, Name, dumps
from attacks.pickles import EVIL, STREAMS
from attacks.zipping import End, Record, archive, records_of, tensor_item

SHAPE = (1, 48, 16)


def item(**lies: Any) -> Callable[[], bytes]:
    """The item with a pickle that lies."""
    return lambda: archive(records(**lies))


def renamed(old: str, data: bytes) -> Callable[[], bytes]:
    """The item with other bytes in a record."""
    return lambda: archive([replace(row, data=data) if row.name == f"archive/{old}" else row for row in records()])


def pickled(value: Any) -> Callable[[], bytes]:
    """The item with any pickle."""
    return lambda: archive(records_of(value if isinstance(value, bytes) else dumps(value), payload_of()))


def short() -> bytes:
    """A storage of 100 bytes for a tensor of 1536."""
    rows = records()
    return archive([replace(row, data=row.data[:100]) if row.name == "archive/data/0" else row for row in rows])


LIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "storage_shorter_than_declared": ("100 bytes for a tensor of 1536.", short),
    "storage_count_too_small": ("A storage of 10 elements.", item(count=10)),
    "storage_count_of_text": ("A storage of `768` elements.", item(count="768")),
    "storage_count_huge": ("A storage of 2**62 elements.", item(count=2**62)),
    "storage_count_negative": ("A storage of -1 elements.", item(count=-1)),
    "transposed_view": ("Strides of a transposed view.", item(strides=(768, 1, 48))),
    "strides_of_zero": ("Strides of 0: one element for all.", item(strides=(0, 0, 0))),
    "strides_negative": ("Negative strides.", item(strides=(768, -16, 1))),
    "strides_huge": ("Strides that leave the storage.", item(strides=(768, 2**60, 1))),
    "strides_too_few": ("Strides of another rank.", item(strides=(16, 1))),
    "offset_of_one": ("A view that begins at element 1.", item(offset=1)),
    "offset_negative": ("A view that begins before the storage.", item(offset=-1)),
    "offset_huge": ("A view that begins at 2**62.", item(offset=2**62)),
    "shape_differs": ("Another shape than the plan's.", item(shape=(1, 16, 48))),
    "shape_flat": ("The plan's elements in one dimension.", item(shape=(768,), strides=(1,))),
    "shape_huge": ("A shape of 2**62.", item(shape=(2**62, 48, 16))),
    "shape_of_floats": ("A shape of floats.", item(shape=(1.0, 48.0, 16.0))),
    "storage_of_another_dtype": ("float16 where the plan says bfloat16.", item(storage=Name("torch", "HalfStorage"))),
    "storage_unknown": ("A storage that torch does not have.", item(storage=Name("torch", "EvilStorage"))),
    "storage_is_a_function": ("A storage that is os.system.", item(storage=Name("os", "system"))),
    "storage_on_a_device": ("A location that is a device of another machine.", item(location=Name("os", "system"))),
    "storage_key_is_a_path": ("A storage whose record would leave the archive.", item(key="../data.pkl")),
    "storage_key_of_nothing": ("A storage whose record is not there.", item(key="7")),
    "rebuild_is_os_system": ("The tensor is rebuilt by os.system.", item(rebuild=Name("os", "system"))),
    "rebuild_is_eval": ("The tensor is rebuilt by eval.", item(rebuild=Name("builtins", "eval"))),
    "rebuild_of_another_module": ("A rebuild function of a module that looks like torch's.", item(rebuild=Name("torch._utilsx", "_rebuild_tensor_v2"))),
    "rebuild_parameter": ("A parameter, whose hooks are data of the attacker.", item(rebuild=Name("torch._utils", "_rebuild_parameter"))),
    "rebuild_from_type": ("A subclass of the attacker.", item(rebuild=Name("torch._tensor", "_rebuild_from_type_v2"))),
    "hooks_are_a_call": ("Backward hooks that are a call.", item(hooks=EVIL["exec"])),
    "byte_order_big": ("Big-endian payload: convert or refuse, never take as it is.", renamed("byteorder", b"big")),
    "byte_order_unknown": ("A byte order that nobody knows.", renamed("byteorder", b"middle")),
    "root_is_a_gadget": ("os.system where the tensor is wanted.", pickled(EVIL["os_system"])),
    "root_is_a_list": ("A list where the tensor is wanted.", pickled([1])),
    "root_is_none": ("None where the tensor is wanted.", pickled(None)),
    "root_is_sparse": ("A sparse tensor.", pickled(Call(Name("torch._utils", "_rebuild_sparse_tensor"), (Name("torch", "sparse_coo"), ())))),
    "hash_bomb": ("A key that never hashes.", pickled(STREAMS["hash_bomb"][1]())),
    "memo_bomb": ("A memo index of 2**31.", pickled(STREAMS["memo_bomb"][1]())),
    "nesting": ("A hundred thousand lists in each other.", pickled(STREAMS["nesting"][1]())),
    "bytearray_length_lie": ("A bytearray of 2**62.", pickled(STREAMS["bytearray_length_lie"][1]())),
}  # fmt: skip

ODDITIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "another_folder_name": ("The folder's name is free.", lambda: archive([replace(row, name=row.name.replace("archive", "__0_0")) for row in records()])),
    "no_small_records": ("Older torch writes only pickle, payload and version.", lambda: archive([row for row in records() if row.name.endswith(("data.pkl", "data/0", "version"))])),
    "unaligned": ("Payloads need no alignment.", lambda: archive([replace(row, aligned=False) for row in records()])),
    "directory_in_another_order": ("Records in any order.", lambda: archive(list(reversed(records())))),
    "descriptors": ("Sizes behind the payload, as torch writes them.", lambda: tensor_item("bfloat16", SHAPE, payload_of())),
    "end64": ("zip64 end records, as torch writes them always.", lambda: archive(records(), End(zip64=_end64()))),
    "twenty_thousand_records": ("Records that nobody needs cost what their bytes cost.", lambda: archive([*records(), *(Record(f"archive/x{n}", b"") for n in range(20_000))])),
    "timestamps_and_comment": ("A comment in the directory.", lambda: archive([replace(row, comment=b"made by hand") for row in records()])),
}  # fmt: skip


def _end64() -> tuple[int, int, int]:
    from attacks.archives import total

    rows = records()
    return (len(rows), *total(rows))


def _enter(table: dict[str, tuple[str, Callable[[], bytes]]], outcome: str, words: str) -> None:
    for name, (said, make) in table.items():

        def build(bench: Bench, make: Callable[[], bytes] = make) -> None:
            put(bench, make())

        build.__name__, build.__doc__ = name, said
        attack(outcome, "mcore", words, "")(build)


_enter(LIES, "reject", WORDS)
_enter(ODDITIES, "ok", "mcore2hf check verify")


@attack("reject", "mcore", WORDS, "")
def flipped_bit_in_the_payload(bench: Bench) -> None:
    """One bit of one weight, which torch.load does not notice."""
    plan = draft()
    plan.lay()
    bench.rewrite(plan)
    path = bench.folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(payload_of()) + COUNT // 2] ^= 4
    path.write_bytes(data)


@attack("reject", "mcore", WORDS, "")
def swapped_items(bench: Bench) -> None:
    """The items of two layers change places with their checksums, padding apart: only the manifest could know; sizes here differ."""
    plan = draft()
    chunks = plan.entries[FC1].chunks
    chunks[0].item = tensor_item("bfloat16", (1, 24, 16), payload_of()[: COUNT // 2])
    bench.rewrite(plan)


@attack("reject", "mcore", "mcore2hf check plan", "")
def file_cut_short(bench: Bench) -> None:
    """The last file of a copy that broke off."""
    path = bench.folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1000])


@attack("reject", "mcore", "mcore2hf check plan", "")
def file_missing(bench: Bench) -> None:
    """A file that the plan names is gone."""
    (bench.folder / "__0_0.distcp").unlink()


@attack("reject", "mcore", "mcore2hf check", "")
def file_of_zeros(bench: Bench) -> None:
    """A file of the right size that was never written."""
    path = bench.folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))


@attack("ok", "mcore", "mcore2hf check")
def foreign_records(bench: Bench) -> None:
    """Records that no reader needs are legal when they are plain."""
    put(bench, archive([*records(), Record("archive/.note", b"hello")]))
