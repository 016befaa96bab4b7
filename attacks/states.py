"""`common.pt` and the train states: open but inert names, containers that are not those of torch.save."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import arguments, common
from attacks.opcodes import Built, Call, Name, New, Pairs, Persistent, dumps
from attacks.pickles import SHELL, SONG, STREAMS
from attacks.zipping import Record, archive, records_of, saved

EVIL = Call(Name("os", "system"), (SHELL,))
WORDS = "mcore2hf check"


def write(bench: Bench, value: Any, *payloads: bytes) -> None:
    """Replace `common.pt` by what torch.save would write."""
    (bench.folder / "common.pt").write_bytes(value if isinstance(value, bytes) else saved(value, *payloads))


def reject(needle: str = r"common\.pt") -> Any:
    """A state that must be refused."""
    return attack("reject", "mcore", WORDS, needle)


def inert(needle: str = "") -> Any:
    """A state whose strange parts stay data; the weights are right, and a note may say what was found."""
    return attack("ok", "mcore", "mcore2hf inspect check", needle)


@inert()
def users_own_class(bench: Bench) -> None:
    """An instance of a class that is not installed, in a field that nobody needs."""
    args = New(Name("argparse", "Namespace"), arguments(hook=New(Name("my_project.hooks", "Hook"), {"a": 1})))
    write(bench, common(args=args))


@inert()
def gadget_in_an_unused_field(bench: Bench) -> None:
    """`os.system` in the scheduler's state stays two words."""
    write(bench, common(opt_param_scheduler=EVIL))


@inert()
def gadget_in_an_unused_argument(bench: Bench) -> None:
    """`exec` in an argument stays two words."""
    args = New(Name("argparse", "Namespace"), arguments(tokenizer=Call(Name("builtins", "exec"), (SONG,))))
    write(bench, common(args=args))


@inert()
def simple_namespace(bench: Bench) -> None:
    """`types.SimpleNamespace` is as good as argparse's."""
    write(bench, common(args=New(Name("types", "SimpleNamespace"), arguments())))


@inert()
def enums_of_megatron(bench: Bench) -> None:
    """Enumerations of megatron-core, which is not imported."""
    backend = Call(Name("megatron.core.transformer.enums", "AttnBackend"), (5,))
    write(bench, common(args=New(Name("argparse", "Namespace"), arguments(attention_backend=backend))))


@inert()
def empty_dictionary(bench: Bench) -> None:
    """An empty state loads in Megatron, too."""
    write(bench, {})


@inert()
def protocol_4(bench: Bench) -> None:
    """Another protocol than torch's, with frames and memo."""
    plain = pickle.dumps({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}, 4)
    write(bench, archive(records_of(plain)))


@inert()
def a_tensor_in_the_state(bench: Bench) -> None:
    """A tensor among the scheduler's numbers."""
    storage = Persistent(("storage", Name("torch", "LongStorage"), "0", "cpu", 1))
    tensor = Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (storage, 0, (), (), False, Call(Name("collections", "OrderedDict"), ())),
    )
    write(bench, common(opt_param_scheduler={"steps": tensor}), bytes(8))


@attack(
    "reject",
    "mcore",
    "",
    "num_hidden_layers|num_layers|common",
    "mcore2hf {src} {dst} --no-sync --arch LlamaForCausalLM",
)
def gadget_in_a_needed_argument(bench: Bench) -> None:
    """`num_layers` is a call, and nothing else tells the configuration."""
    (bench.folder / "hf" / "config.json").unlink()
    write(bench, common(args=New(Name("argparse", "Namespace"), arguments(num_layers=EVIL))))


@reject()
def gadget_for_the_dialect(bench: Bench) -> None:
    """`content_metadata` is a call."""
    write(bench, common(content_metadata=EVIL))


@reject()
def gadget_as_root(bench: Bench) -> None:
    """The whole state is a call."""
    write(bench, EVIL)


@reject()
def root_is_a_list(bench: Bench) -> None:
    """The state is no dictionary."""
    write(bench, [1, 2])


@reject()
def args_built_twice(bench: Bench) -> None:
    """Two states on one Namespace: readers differ in which they believe."""
    twice = Built(New(Name("argparse", "Namespace"), arguments()), {"num_layers": 10**9})
    write(bench, common(args=twice))


@reject()
def duplicate_keys(bench: Bench) -> None:
    """Two `content_metadata`."""
    rows = (*common().items(), ("content_metadata", {"singleton_local_shards": True}))
    write(bench, Pairs(rows))


@attack("warn", "mcore", "mcore2hf check", "dialect|content_metadata|singleton")
def dialect_that_the_keys_deny(bench: Bench) -> None:
    """`content_metadata` says per-layer keys, the plan has stacked ones."""
    write(bench, common(content_metadata={"singleton_local_shards": True}))


@attack("reject", "mcore", "", "layers|common", "mcore2hf {src} {dst} --no-sync --arch LlamaForCausalLM")
def billion_layers(bench: Bench) -> None:
    """`num_layers` of 10**9, and no configuration beside it."""
    (bench.folder / "hf" / "config.json").unlink()
    write(bench, common(args=New(Name("argparse", "Namespace"), arguments(num_layers=10**9))))


@reject()
def bare_pickle(bench: Bench) -> None:
    """A pickle without a container."""
    write(bench, dumps(common()))


@reject()
def bare_gadget(bench: Bench) -> None:
    """A gadget without a container."""
    write(bench, dumps(EVIL))


@reject()
def legacy_format(bench: Bench) -> None:
    """The format before zip: several pickles in a row, the first a magic number."""
    write(bench, pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + dumps(EVIL))


@reject()
def tar(bench: Bench) -> None:
    """The format before that: a tar with `pickle` in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        row = tarfile.TarInfo("pickle")
        row.size = len(dumps(EVIL))
        file.addfile(row, io.BytesIO(dumps(EVIL)))
    write(bench, data.getvalue())


@reject()
def script_module(bench: Bench) -> None:
    """A TorchScript archive, which torch.load would run."""
    rows = records_of(dumps(common()))
    write(
        bench, archive([*rows, Record("archive/constants.pkl", dumps(())), Record("archive/code/x.py", SONG.encode())])
    )


@reject()
def two_pickles(bench: Bench) -> None:
    """Two records `data.pkl` in two folders: readers differ in which they open."""
    write(bench, archive([*records_of(dumps(common())), Record("evil/data.pkl", dumps(EVIL))]))


@reject()
def no_pickle(bench: Bench) -> None:
    """No `data.pkl`."""
    write(bench, archive(records_of(dumps({}))[1:]))


@reject()
def compressed_bomb(bench: Bench) -> None:
    """A deflated pickle of 300 MB."""
    packed = zlib.compress(bytes(300_000_000), 9)[2:-4]
    write(
        bench,
        archive([Record("archive/data.pkl", packed, method=8, central_size=300_000_000, packed_size=len(packed))]),
    )


@reject()
def missing(bench: Bench) -> None:
    """No state and no `common_state`, so the plan is not complete."""
    (bench.folder / "common.pt").write_bytes(b"")


@reject()
def sparse_of_a_terabyte(bench: Bench) -> None:
    """A state of 1 TB that costs no disk."""
    with (bench.folder / "common.pt").open("r+b") as file:
        file.truncate(10**12)


def _enter() -> None:
    for name in ("hash_bomb", "cycle", "memo_bomb", "bytearray_length_lie", "nested_tuples", "nesting", "inst", "obj", "extension",
                 "integer_of_a_megabyte", "setitem_on_a_name", "string_length_lie_8", "unhashable_key", "print_bomb"):  # fmt: skip

        def build(bench: Bench, make: Any = STREAMS[name][1]) -> None:
            write(bench, archive(records_of(make())))

        build.__name__, build.__doc__ = f"{name}_in_common", f"In common.pt: {STREAMS[name][0]}"
        reject()(build)


_enter()


def _train_states() -> None:
    rows: dict[str, tuple[str, Any]] = {
        "gadget": ("a gadget as a whole", lambda: saved(EVIL)),
        "gadget_step": ("a gadget for `step`", lambda: saved({"step": EVIL})),
        "hash_bomb": ("a key that never hashes", lambda: archive(records_of(STREAMS["hash_bomb"][1]()))),
        "not_a_zip": ("a bare pickle", lambda: dumps(EVIL)),
        "zeros": ("zeros", lambda: bytes(4000)),
    }
    for word, (said, make) in rows.items():

        def tracker(bench: Bench, make: Any = make) -> None:
            (bench.source / "latest_train_state.pt").write_bytes(make())

        def inner(bench: Bench, make: Any = make) -> None:
            (bench.folder / "train_state.pt").write_bytes(make())

        for build, outcome in ((tracker, "warn"), (inner, "ok")):
            build.__name__ = f"train_state_{word}_as_{build.__name__}"
            build.__doc__ = f"A train state that is {said}."
            attack(outcome, "mcore", "mcore2hf check inspect", "train_state")(build)


_train_states()


@attack("reject", "mcore", "mcore2hf", "train_state|iteration")
def two_trackers_that_differ(bench: Bench) -> None:
    """The text names iteration 0, the train state 7: training went on."""
    storage = Persistent(("storage", Name("torch", "LongStorage"), "0", "cpu", 1))
    step = Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (storage, 0, (), (), False, Call(Name("collections", "OrderedDict"), ())),
    )
    data = saved({"step": step}, (7).to_bytes(8, "little"))
    (bench.source / "latest_train_state.pt").write_bytes(data)
