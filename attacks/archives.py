"""A `.distcp` item as a zip that lies: methods, flags, sizes, names, places, zip64."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import FC1, draft
from attacks.zipping import End, Record, archive, records_of, tensor_pickle

SHAPE = (1, 48, 16)
COUNT = 2 * 48 * 16
WORDS = "mcore2hf check"
Change = Callable[[list[Record]], list[Record]]


def payload_of() -> bytes:
    """The payload of the attacked chunk, layer 0 of fc1."""
    from attacks.checkpoint import megatron

    return megatron()[FC1][1][:COUNT]


def records(**lies: Any) -> list[Record]:
    """The records of the attacked item, sizes in the local headers too."""
    rows = records_of(tensor_pickle("bfloat16", SHAPE, **lies), payload_of())
    return [replace(row, descriptor=False) for row in rows]


def put(bench: Bench, item: bytes) -> None:
    """Replace the item."""
    plan = draft()
    plan.entries[FC1].chunks[0].item = item
    bench.rewrite(plan)


def with_payload(**changes: Any) -> list[Record]:
    """The records with a changed `data/0`."""
    return [replace(row, **changes) if row.name == "archive/data/0" else row for row in records()]


def with_pickle(**changes: Any) -> list[Record]:
    """The records with a changed `data.pkl`."""
    return [replace(row, **changes) if row.name == "archive/data.pkl" else row for row in records()]


def deflated() -> list[Record]:
    """The payload compressed, honestly."""
    packed = zlib.compress(payload_of())[2:-4]
    return with_payload(
        data=packed, method=8, central_size=COUNT, packed_size=len(packed), crc=zlib.crc32(payload_of())
    )


def bomb() -> list[Record]:
    """A compressed payload of 100 MB."""
    packed = zlib.compress(bytes(100_000_000), 9)[2:-4]
    return with_payload(data=packed, method=8, central_size=COUNT, packed_size=len(packed))


def big_pickle() -> list[Record]:
    """A `data.pkl` of 2 MiB, all NOP-like pops."""
    pickle = records()[0].data
    return with_pickle(data=pickle[:2] + b"N0" * (1 << 20) + pickle[2:])


def zip64(sizes: int, *more: int) -> bytes:
    """An extra field of 64-bit values."""
    values = (sizes, sizes, *more)
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def total(rows: list[Record]) -> tuple[int, int]:
    """Size and place of the central directory."""
    plain = archive(rows)
    size, offset = struct.unpack("<2I", plain[-10:-2])
    return size, offset


def sixty_four(count: int | None = None, size: int | None = None, offset: int | None = None, **more: Any) -> bytes:
    """The archive with zip64 end records; None: the true value."""
    rows = records()
    true_size, true_offset = total(rows)
    values = (
        len(rows) if count is None else count,
        true_size if size is None else size,
        true_offset if offset is None else offset,
    )
    return archive(rows, End(zip64=values, **more))


LIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "compressed": ("The payload is deflated.", lambda: archive(deflated())),
    "compressed_bomb": ("A deflated payload of 100 MB.", lambda: archive(bomb())),
    "method_unknown": ("A method of 99.", lambda: archive(with_payload(method=99))),
    "pickle_compressed_method": ("`data.pkl` says deflated.", lambda: archive(with_pickle(method=8))),
    "encrypted_flag": ("The payload says that it is encrypted.", lambda: archive(with_payload(flags=1))),
    "strong_encryption_flag": ("The flag of strong encryption.", lambda: archive(with_payload(flags=0x41))),
    "patched_flag": ("Compressed patched data.", lambda: archive(with_payload(flags=0x20))),
    "duplicate_payload": ("Two records `data/0`: readers differ in which they take.", lambda: archive([*records(), Record("archive/data/0", bytes(COUNT))])),
    "duplicate_pickle": ("Two records `data.pkl`.", lambda: archive([*records(), records()[0]])),
    "second_folder": ("A second folder with its own tensor.", lambda: archive([*records(), *(replace(row, name=row.name.replace("archive", "evil")) for row in records())])),
    "local_name_differs": ("The local header has another name than the directory.", lambda: archive(with_payload(local_name="archive/data/1"))),
    "local_size_differs": ("The local header has another size than the directory.", lambda: archive(with_payload(local_size=COUNT - 2))),
    "local_crc_differs": ("The local header has another checksum.", lambda: archive(with_payload(local_crc=1))),
    "crc_wrong": ("A flipped bit: the checksum is that of other bytes.", lambda: archive(with_payload(crc=1, local_crc=1))),
    "crc_of_zero": ("A checksum of 0 in both headers.", lambda: archive(with_payload(crc=0, local_crc=0))),
    "packed_size_differs": ("A stored record with two sizes.", lambda: archive(with_payload(packed_size=COUNT - 2))),
    "size_past_the_end": ("A record longer than the item.", lambda: archive(with_payload(central_size=10**9, local_size=10**9))),
    "size_of_4_gib": ("A record of 4 GiB - 2.", lambda: archive(with_payload(central_size=0xFFFFFFFE, local_size=0xFFFFFFFE))),
    "overlapping_records": ("`data/0` and `version` share their bytes.", lambda: archive(overlapping())),
    "all_in_one_place": ("Every record points to the first.", lambda: archive([replace(row, offset=0) for row in records()])),
    "offset_past_the_end": ("A record behind the item's end.", lambda: archive(with_payload(offset=10**9))),
    "offset_into_the_payload": ("A local header inside a payload, made by the attacker.", lambda: archive(hidden())),
    "zip64_size_lie": ("A zip64 size of 2**63.", lambda: archive(with_payload(central_size=0xFFFFFFFF, packed_size=0xFFFFFFFF, central_extra=zip64(2**63)))),
    "zip64_negative": ("A zip64 size that is -1 when signed.", lambda: archive(with_payload(central_size=0xFFFFFFFF, packed_size=0xFFFFFFFF, central_extra=zip64(2**64 - 1)))),
    "zip64_missing": ("Sizes say `see zip64`, and there is none.", lambda: archive(with_payload(central_size=0xFFFFFFFF, packed_size=0xFFFFFFFF))),
    "zip64_short": ("A zip64 field of 3 bytes.", lambda: archive(with_payload(central_size=0xFFFFFFFF, packed_size=0xFFFFFFFF, central_extra=struct.pack("<2H3s", 1, 3, b"abc")))),
    "zip64_twice": ("Two zip64 fields that differ.", lambda: archive(with_payload(central_size=0xFFFFFFFF, packed_size=0xFFFFFFFF, central_extra=zip64(COUNT) + zip64(7)))),
    "zip64_offset_lie": ("A zip64 header offset of 2**62.", lambda: archive(with_payload(offset=0xFFFFFFFF, central_extra=struct.pack("<2HQ", 1, 8, 2**62)))),
    "extra_length_lie": ("An extra field that says more bytes than it has.", lambda: archive(with_payload(central_extra=struct.pack("<2H", 7, 60_000)))),
    "end64_count_lie": ("A zip64 count of 2**60 records.", lambda: sixty_four(count=2**60)),
    "end64_size_lie": ("A zip64 directory of 2**60 bytes.", lambda: sixty_four(size=2**60)),
    "end64_offset_lie": ("A zip64 directory at 2**60.", lambda: sixty_four(offset=2**60)),
    "end64_disagrees": ("The two end records name two directories.", lambda: sixty_four(offset=0)),
    "locator_lie": ("The zip64 locator points nowhere.", lambda: sixty_four(locator=2**60)),
    "count_lie_less": ("The end record counts one record too few.", lambda: archive(records(), End(count=6))),
    "count_lie_more": ("The end record counts 65535 records.", lambda: archive(records(), End(count=65535))),
    "directory_size_lie": ("The end record has a wrong size.", lambda: archive(records(), End(size=7))),
    "directory_offset_lie": ("The end record has a wrong offset.", lambda: archive(records(), End(offset=10))),
    "directory_offset_past_the_end": ("The directory lies behind the item.", lambda: archive(records(), End(offset=10**9))),
    "several_disks": ("An archive of several disks.", lambda: archive(records(), End(disk=1))),
    "comment_that_is_an_end": ("A comment with a second end record: readers differ in which they take.", lambda: archive(records(), End(comment=b"PK\5\6" + bytes(18)))),
    "trailing_bytes": ("Bytes behind the end record.", lambda: archive(records(), End(trailing=b"x" * 30))),
    "no_end": ("An item cut short.", lambda: archive(records())[:-22]),
    "no_bytes": ("An item of zeros.", lambda: bytes(3000)),
    "path_in_a_record": ("A record that would leave the folder if it were unpacked.", lambda: archive([*records(), Record("archive/../../../outside/owned", b"x")])),
    "absolute_record": ("A record with an absolute name.", lambda: archive([*records(), Record("/etc/owned", b"x")])),
    "nul_in_a_record": ("A name that is cut short by some readers.", lambda: archive(with_payload(name="archive/data/0\0x"))),
    "code_in_the_archive": ("A TorchScript archive.", lambda: archive([*records(), Record("archive/constants.pkl", b"\x80\x02)."), Record("archive/code/x.py", b"x")])),
    "no_payload": ("No `data/0`.", lambda: archive([row for row in records() if row.name != "archive/data/0"])),
    "no_pickle": ("No `data.pkl`.", lambda: archive(records()[1:])),
    "big_pickle": ("A `data.pkl` of 2 MiB.", lambda: archive(big_pickle())),
}  # fmt: skip


def overlapping() -> list[Record]:
    """`version` begins inside the payload, behind a local header that the payload holds."""
    head = archive([Record("archive/version", b"3\n")])[:47]
    rows = with_payload(data=head + payload_of()[len(head) :])
    start = archive(rows).index(head)
    return [replace(row, offset=start) if row.name == "archive/version" else row for row in rows]


def hidden() -> list[Record]:
    """`data/0` itself begins inside an earlier record."""
    fake = archive([Record("archive/data/0", bytes(COUNT))])[: 30 + 14 + COUNT]
    rows = [Record("archive/extra", fake), *records()]
    start = archive(rows).index(fake)
    return [replace(row, offset=start) if row.name == "archive/data/0" else row for row in rows]


def _enter() -> None:
    for name, (said, make) in LIES.items():

        def build(bench: Bench, make: Callable[[], bytes] = make) -> None:
            put(bench, make())

        build.__name__, build.__doc__ = name, said
        attack("reject", "mcore", WORDS, "")(build)


_enter()
