"""The table of fuzz targets: for every reader what runs it, which files it starts from and how its input is edited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from fuzz import bases, jsons, opcodes, oracles, repairs, texts, zipping
from transcoder import api, manifest
from transcoder.checking import check
from transcoder.exportplan import plan_export
from transcoder.formats.archive import read_archive, read_tensor
from transcoder.formats.huggingface import open_hf
from transcoder.formats.opening import open_store
from transcoder.formats.pickles import loads
from transcoder.formats.safetensors import INDEX_NAME, read_index, read_shard
from transcoder.formats.statefiles import read_common
from transcoder.formats.torch_dist import METADATA_NAMES, open_torch_dist
from transcoder.formats.trainstate import step_of
from transcoder.hfconfig import read_config
from transcoder.inspection import inspect
from transcoder.iterations import STATE_TRACKER, TEXT_TRACKER, find_iteration, names_iteration
from transcoder.megatron import Megatron, open_megatron
from transcoder.megatronconfig import stored_fields

ARRAY = "embedding.word_embeddings.weight"
Run = Callable[[bytes], object]
Edit = Callable[[Random, bytes], bytes]


def _same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Target:
    """`run` reads bytes and raises nothing but our own errors; `edit` and `repair` make inputs that get further."""

    run: Run
    edit: Edit
    repair: Callable[[bytes], bytes] = _same


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def safetensors(data: bytes) -> None:
    """A weight file."""
    oracles.safetensors(data, read_shard(_put(bases.root() / "weights.safetensors", data)))


def index(data: bytes) -> None:
    """model.safetensors.index.json, beside a small model in one file."""
    folder = bases.spare("index")
    oracles.index(data, read_index(_put(folder / INDEX_NAME, data)))
    open_hf(folder)


def config(data: bytes) -> None:
    """config.json, planned against the tensors of a small model."""
    folder = bases.spare("config")
    _put(folder / "config.json", data)
    read_config(folder)
    inspect(folder)
    api.plan_hf2mcore(folder, make_vocab_size_divisible_by=16)


def metadata(data: bytes) -> None:
    """`.metadata`: the pickle, the plan in it, and the model that it holds."""
    folder = bases.iteration(bases.plain("metadata"))
    _put(folder / ".metadata", data)
    oracles.pickled(data, loads(data, METADATA_NAMES, ".metadata"))
    oracles.checkpoint(open_torch_dist(folder))
    _opened(folder)


def pickle(data: bytes) -> None:
    """Any pickle, whichever names it has."""
    oracles.pickled(data, loads(data, None, "pickle"))


def common(data: bytes) -> None:
    """common.pt: the archive, its pickle, and the arguments in it."""
    folder = bases.iteration(bases.plain("common"))
    (folder / "run_config.yaml").unlink(missing_ok=True)
    _put(folder / "common.pt", data)
    read_common(folder)
    _opened(folder)


def item(data: bytes) -> None:
    """One tensor of a `.distcp` file."""
    view = memoryview(data)
    oracles.archive(data, {name: (row.start, row.size) for name, row in read_archive(view, "item").items()})
    stored = read_tensor(view, "item")
    assert stored.start + stored.size <= len(data)


def manifests(data: bytes) -> None:
    """transcode-manifest.json, and everything that is done by it before payloads are read."""
    folder = bases.iteration(bases.whole("manifest"))
    _put(folder / manifest.NAME, data)
    manifest.read(folder)
    plan_export(open_megatron(folder))
    check(folder, True, 100.0)


def tracker(data: bytes) -> None:
    """latest_checkpointed_iteration.txt."""
    folder = bases.whole("tracker")
    names_iteration(_put(folder / TEXT_TRACKER, data), bases.iteration(folder))
    found = find_iteration(folder)
    assert found.parent == folder and (found / ".metadata").is_file()


def run_config(data: bytes) -> None:
    """run_config.yaml of Megatron Bridge."""
    folder = bases.iteration(bases.plain("run-config"))
    _put(folder / "run_config.yaml", data)
    stored_fields(folder)
    _opened(folder)


def train_state(data: bytes) -> None:
    """train_state.pt of Megatron Bridge, and as the tracker that it is, too."""
    folder = bases.whole("train-state")
    names_iteration(_put(folder / STATE_TRACKER, data), bases.iteration(folder))
    assert isinstance(step_of(memoryview(data)), int)
    find_iteration(folder)


def rank(data: bytes) -> None:
    """model_optim_rng.pt of the one rank of a legacy checkpoint, and the model in it."""
    folder = bases.ranks()
    _put(folder / "model_optim_rng.pt", data)
    opened = _opened(folder.parents[1])
    for spec in opened.store.catalog.values():
        assert all(chunk.offset + chunk.nbytes <= len(data) for chunk in spec.chunks)


def backend(data: bytes) -> None:
    """metadata.json of an iteration."""
    folder = bases.iteration(bases.plain("backend"))
    _put(folder / "metadata.json", data)
    _opened(folder)


def zarray(data: bytes) -> None:
    """`.zarray` of one array of a checkpoint, and the chunks that it asks for."""
    _array("zarr", f"{ARRAY}/.zarray", data)


def zarr_json(data: bytes) -> None:
    """`zarr.json` of one array of a checkpoint, with sharding."""
    _array("zarr3", f"{ARRAY}/zarr.json", data)


def shard(data: bytes) -> None:
    """A file of chunks with its index."""
    _array("zarr3", f"{ARRAY}/c/0/0", data)


def _array(form: str, name: str, data: bytes) -> None:
    folder = bases.arrays(form)
    good = (folder / name).read_bytes()
    try:
        _put(folder / name, data)
        oracles.checkpoint(open_store(folder))
        _opened(folder)
    finally:
        _put(folder / name, good)


def _opened(folder: Path) -> Megatron:
    inspect(folder)
    return open_megatron(folder, arch=bases.ARCHITECTURE)


@cache
def _words() -> tuple[str, ...]:
    """What a config may say: the classes and the fields that recipes know."""
    from transcoder.recipes import registry

    names = {name for recipe in registry().values() for text in recipe.axes.values() for name in _identifiers(text)}
    fields = {name for recipe in registry().values() for name in recipe.model}
    return (*sorted(registry()), *sorted(names | fields), *_FIELDS)


_FIELDS = ("rope_scaling", "rope_parameters", "text_config", "vision_config", "quantization_config", "layer_types")


def _identifiers(text: str) -> list[str]:
    return "".join(c if c.isidentifier() or c.isdigit() else " " for c in text).split()


def _config(rng: Random, data: bytes) -> bytes:
    return jsons.mutate(rng, data, _words())


def _archive(rng: Random, data: bytes) -> bytes:
    return zipping.mutate(rng, data, opcodes.mutate)


TARGETS: dict[str, Target] = {
    "safetensors": Target(safetensors, repairs.edited_safetensors, repairs.safetensors),
    "index": Target(index, jsons.mutate),
    "config": Target(config, _config),
    "metadata": Target(metadata, opcodes.mutate),
    "pickle": Target(pickle, opcodes.mutate),
    "common": Target(common, _archive, zipping.repaired),
    "item": Target(item, _archive, zipping.repaired),
    "manifest": Target(manifests, repairs.edited_manifest, repairs.digest),
    "tracker": Target(tracker, texts.tracker),
    "run_config": Target(run_config, texts.yaml),
    "train_state": Target(train_state, _archive, zipping.repaired),
    "backend": Target(backend, jsons.mutate),
    "rank": Target(rank, _archive, zipping.repaired),
    "zarray": Target(zarray, jsons.mutate),
    "zarr_json": Target(zarr_json, jsons.mutate),
    "shard": Target(shard, repairs.edited_shard, repairs.shard),
}
