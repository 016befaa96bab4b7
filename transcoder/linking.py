"""reshard --link: payload files stay as they are and are hard-linked; only what is said of them is written anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from zlib import crc32

from transcoder.disk import write_file
from transcoder.errors import OutputError, Problem, UsageError
from transcoder.formats.archive import archive
from transcoder.formats.pickled import dumps
from transcoder.formats.placement import Placement
from transcoder.formats.torch_dist_writer import TorchDistPlacement
from transcoder.megatron import Megatron
from transcoder.planner import Model
from transcoder.spec import Box, DType, TensorSpec

OBJECTS = "__objects_0.distcp"  # holds the one object, where the source's files have none to point at
BLOB = archive(dumps([None]))
Place = tuple[str, int, int]  # file, offset and length of an item


def linked_placement(source: Megatron, model: Model, dtype: DType, form: str) -> TorchDistPlacement:
    """Where the source's own files hold the tensors of `model`. Raises UsageError when bytes would have to change."""
    if source.store.form != "torch_dist" or form != "torch_dist":
        problem = Problem(expected="torch_dist on both sides", found=f"{source.store.form} → {form}")
        raise UsageError("--link: files of this format cannot stay as they are", kind="link", problems=[problem])
    keys = dict(_keys(source, model))
    catalog: dict[str, TensorSpec] = {}
    items: dict[tuple[str, Box], Place] = {}
    for name, tensor in model.mcore.items():
        found, shape, places = source.store.tensors.get(keys.get(name, ""), (dtype, (), ()))
        if found != tensor.family.dtype(dtype) or shape != tensor.shape:
            problem = Problem(tensor=name, expected=f"{found.name} {list(shape)}", found=f"{list(tensor.shape)}")
            raise UsageError("--link: the bytes of tensors would change; leave it out", kind="link", problems=[problem])
        catalog[name] = TensorSpec(name, found, shape, source.store.catalog[keys[name]].chunks)
        items |= {(name, box): (item.file, item.offset, item.length) for box, item in places}
    return _with_objects(source, model, catalog, items)


def _keys(source: Megatron, model: Model) -> Iterator[tuple[str, str]]:
    """Target key and source key of every stored tensor, by the Hugging Face tensors that they hold."""
    for name, tensor in model.hf.items():
        if not tensor.family.rule.alias:
            yield tensor.key, source.model.hf[name].key


def _with_objects(
    source: Megatron, model: Model, catalog: dict[str, TensorSpec], items: dict[tuple[str, Box], Place]
) -> TorchDistPlacement:
    wanted = tuple(model.objects())
    found = {key: source.store.objects[key] for key in wanted if key in source.store.objects}
    places: dict[str, Place] = {key: (item.file, item.offset, item.length) for key, item in found.items()}
    places |= {key: (OBJECTS, 0, len(BLOB)) for key in wanted if key not in found}
    names = sorted({file for file, _, _ in (*items.values(), *places.values())} - {OBJECTS})
    sizes = {name: (source.path / name).stat().st_size for name in names}
    if len(found) < len(wanted):
        sizes[OBJECTS] = len(BLOB)
    return TorchDistPlacement(catalog, sizes, {}, wanted, items, BLOB, places)


def link_files(source: Megatron, placement: Placement, folder: Path, sync: bool) -> None:
    """Give every payload file a name in `folder`, too. Raises OutputError where the file system cannot."""
    folder.mkdir()
    for name in placement.sizes:
        if name == OBJECTS:
            write_file(folder / name, BLOB, sync)
        else:
            _link(source.path / name, folder / name)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        problem = Problem(file=str(old), found=str(error.strerror), hint="leave out --link to copy the bytes")
        raise OutputError("payload files cannot be linked to that place", kind="link", problems=[problem]) from error


def known_digests(source: Megatron, placement: Placement) -> tuple[Mapping[str, str] | None, Mapping[str, str]]:
    """Digests of tensors and of payload files as the source's manifest has them; None and nothing if it lacks one."""
    table = source.manifest or {}
    tensors = {row["name"]: row["tree"] for row in table.get("tensors", [])}
    files = {row["name"]: row["digest"] for row in table.get("files", [])}
    files[OBJECTS] = f"crc32:{crc32(BLOB):08x}"
    known = placement.sizes.keys() <= files.keys() and source.model.hf.keys() <= tensors.keys()
    return (tensors, {name: files[name] for name in placement.sizes}) if known else (None, {})
