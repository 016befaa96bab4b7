"""Files beside the weights: pickles, code, secrets behind links, and what floods a disk."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.opcodes import Call, Name, dumps
from attacks.pickles import SHELL, SONG
from attacks.zipping import saved

GADGET = Call(Name("os", "system"), (SHELL,))


def absent(bench: Bench, *names: str) -> None:
    """Names that must not be in the result: the judge looks for them after an accepted run."""
    (bench.place / "absent").write_text("\n".join(names))


def warned(needle: str) -> Any:
    """A file that is left out, or taken as inert data, with a warning."""
    return attack("warn", "hf", "hf2mcore", needle)


def _tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        file.addfile(tarfile.TarInfo("../../owned"), io.BytesIO(b""))
    return data.getvalue()


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("../../owned", "x")
    return data.getvalue()


PICKLED: dict[str, bytes] = {
    "pytorch_model.bin": saved(GADGET), "model.pt": saved(GADGET), "model.pth": dumps(GADGET), "data.pkl": dumps(GADGET),
    "last.ckpt": saved(GADGET), "array.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n" + dumps(GADGET),
    "arrays.npz": _zip(), "training_args.bin": saved(GADGET), "optimizer.pt": saved(GADGET), "optimizer_state": saved(GADGET),
    "archive.tar.gz": _tar(), "archive.zip": _zip(), "model.gguf": b"GGUF\3\0\0\0" + bytes(100), "model.msgpack": b"\x81\xa1a\x01",
    "model.h5": b"\x89HDF\r\n\x1a\n" + bytes(100), "model.onnx": b"\x08\x07" + bytes(100),
}  # fmt: skip
DISGUISED: dict[str, bytes] = {
    "merges.txt": dumps(GADGET), "notes.md": saved(GADGET), "vocab.json": pickle.dumps({"a": 1}, 4), "readme": _zip(),
    "tokenizer.model": saved(GADGET), "special.txt": b"\x93NUMPY\x01\x00" + bytes(100),
    "weights.txt": b"GGUF\3\0\0\0" + bytes(100), "packed.txt": b"\x1f\x8b\x08\0" + bytes(100),
}  # fmt: skip


def _enter() -> None:
    for table, said in ((PICKLED, "by its name"), (DISGUISED, "by its first bytes")):
        for name, data in table.items():

            def build(bench: Bench, name: str = name, data: bytes = data) -> None:
                (bench.source / name).write_bytes(data)
                absent(bench, name)

            build.__name__ = f"{'disguised' if table is DISGUISED else 'pickled'}_{name.replace('.', '_')}"
            build.__doc__ = f"`{name}` holds weights or a pickle {said}, and is left out."
            warned(name.replace(".", r"\."))(build)


_enter()


@warned(r"modeling_evil\.py")
def code(bench: Bench) -> None:
    """A module is copied as inert data, with a warning, and never imported."""
    song = f"{SONG}\nraise SystemExit(99)\n"
    (bench.source / "modeling_evil.py").write_text(song)


@attack("warn", "hf", "hf2mcore plan check inspect", "")
def modules_that_shadow(bench: Bench) -> None:
    """Modules named as the tool's own imports: a working directory or folder on the path would run them."""
    for name in ("numpy", "json", "yaml", "torch", "transcoder", "sitecustomize", "click", "xxhash"):
        (bench.source / f"{name}.py").write_text(SONG)
    (bench.source / "evil.pth").write_text(f"import os; {SONG}")


@attack("ok", "hf", "hf2mcore")
def template(bench: Bench) -> None:
    """A chat template is text: nothing renders it."""
    (bench.source / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('echo sang >> $ATTACK_CANARY') }}"
    )


@attack("ok", "hf", "hf2mcore")
def broken_tokenizer(bench: Bench) -> None:
    """A tokenizer is not parsed."""
    (bench.source / "tokenizer.json").write_text("[" * 100_000)


@warned(r"huge\.txt")
def huge(bench: Bench) -> None:
    """A sparse file of 1 TB is left out."""
    with (bench.source / "huge.txt").open("wb") as file:
        file.truncate(10**12)
    absent(bench, "huge.txt")


@warned("")
def many_large(bench: Bench) -> None:
    """Six files of 60 MB: 256 MB in all is the limit."""
    for number in range(6):
        with (bench.source / f"large{number}.txt").open("wb") as file:
            file.truncate(60_000_000)


@attack("warn", "hf", "hf2mcore", "")
def thousand_modules(bench: Bench) -> None:
    """A thousand modules: twenty lines say so."""
    folder = bench.source / "extra"
    folder.mkdir()
    for number in range(1000):
        (folder / f"{number}.py").write_text("")


@attack("warn", "hf", "hf2mcore", "")
def deep_folders(bench: Bench) -> None:
    """Folders whose path is longer than the system takes."""
    here, name = os.open(bench.source, os.O_RDONLY), "d" * 200
    for _ in range(25):
        os.mkdir(name, dir_fd=here)
        here, last = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(last)
    os.close(here)


@warned(r"secret\.txt|link")
def link_to_a_secret(bench: Bench) -> None:
    """A side file that links to a file of somebody else is left out."""
    (bench.source / "secret.txt").symlink_to(bench.outside / "secret.txt")
    absent(bench, "secret.txt")


@warned("link|folder")
def link_to_a_folder_outside(bench: Bench) -> None:
    """A folder that is a link to a folder of somebody else is left out."""
    (bench.source / "folder").symlink_to(bench.outside)
    absent(bench, "secret.txt")


@warned("")
def link_to_the_root(bench: Bench) -> None:
    """A folder that is a link to `/`: no walk through it."""
    (bench.source / "folder").symlink_to("/")


@warned("")
def link_to_itself(bench: Bench) -> None:
    """A folder that is a link to the model: no endless walk."""
    (bench.source / "folder").symlink_to(".")


@warned("pipe")
def pipe(bench: Bench) -> None:
    """A pipe among the side files is left out, and nothing waits for it."""
    os.mkfifo(bench.source / "pipe")
    absent(bench, "pipe")


@warned("zero")
def link_to_a_device(bench: Bench) -> None:
    """A link to /dev/zero is left out."""
    (bench.source / "zero").symlink_to("/dev/zero")
    absent(bench, "zero")


@attack("ok", "hf", "hf2mcore")
def odd_modes(bench: Bench) -> None:
    """Executable and setuid files become plain copies of mode 0644."""
    for number, mode in enumerate((0o755, 0o4755, 0o444)):
        path = bench.source / f"script{number}.txt"
        path.write_text("#!/bin/sh\n")
        path.chmod(mode)
    (bench.place / "modes").write_text("0644")


@attack("ok", "hf", "hf2mcore")
def hard_link(bench: Bench) -> None:
    """A hard link is copied, not linked."""
    os.link(bench.source / "LICENSE", bench.source / "COPYING")
    (bench.place / "modes").write_text("0644")


@attack("warn", "hf", "hf2mcore", "")
def names_of_our_own_files(bench: Bench) -> None:
    """Side files named as the files that the checkpoint consists of."""
    for name in (
        "transcode-manifest.json",
        ".metadata",
        "metadata.json",
        "common.pt",
        "__0_0.distcp",
        "run_config.yaml",
    ):
        (bench.source / name).write_text("{}")


@attack("ok", "hf", "hf2mcore")
def git_folder(bench: Bench) -> None:
    """Hooks of a cloned repository are not copied."""
    hooks = bench.source / ".git" / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "post-checkout").write_text("#!/bin/sh\necho sang >> $ATTACK_CANARY\n")
    absent(bench, "post-checkout")


def found_below(root: Path, names: list[str]) -> list[str]:
    """Which of the names a result holds."""
    return sorted({name for _, folders, files in os.walk(root) for name in (*folders, *files)} & set(names))
