"""Covering samples of everything that a checkpoint's files can be, and what independent readers must find in them.

What is expected comes from `naive`, which knows no recipe, and from the spellings written out here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, product
from math import lcm
from pathlib import Path
from typing import Any

import tensorstore
import torch
from naive import alike, expected, loaded, stacked
from torch.distributed import checkpoint as dcp
from zoo import Tensors, made, read_config

Grid = tuple[int, int, int, int]  # tp, pp, ep, etp
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]  # by key: dtype, shape, bytes

FORMS = ("torch_dist", "zarr", "zarr3")
DOCUMENTS = {"zarr": ".zarray", "zarr3": "zarr.json"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYOUTS = ("", "stacked", "per-layer", "singleton")
NORMS = ("te", "local")
TYPES = ("bfloat16", "float32", "float16")
# Three layers make pipelines of two uneven; no two sizes of the last rows are the same on every axis.
GRIDS: tuple[Grid, ...] = (
    (1, 1, 1, 1), (2, 2, 1, 1), (1, 3, 1, 1), (4, 1, 1, 1),
    (1, 2, 4, 1), (2, 3, 2, 1), (2, 1, 2, 2),
)  # fmt: skip
# Dense, tied, biases, norms of queries and keys, shared experts, latent attention and prediction, transposed experts
# with sinks, a vision tower, a hybrid.
KINDS = (
    "llama", "llama-tied", "llama-bias", "qwen3", "qwen2-moe", "deepseek-v3-mtp", "gpt-oss", "qwen3-vl",
    "nemotron-h-moe",
)  # fmt: skip
ALWAYS_FLOAT32 = re.compile(r".*\.(expert_bias|mixer\.A_log|mixer\.D|softmax_offset)")
NOT_GATED = ("vision_model.", "visual.", "vision_tower.")


@dataclass(frozen=True)
class Row:
    """One way to write one model."""

    kind: str
    form: str
    layout: str
    grid: Grid
    norms: str
    dtype: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.form, self.layout or "default", "".join(map(str, self.grid)), self.norms))

    @property
    def options(self) -> dict[str, Any]:
        """As `hf2mcore` and `reshard` take them."""
        sizes = dict(zip(("tp", "pp", "ep", "etp"), self.grid, strict=True))
        return {**sizes, "format": self.form, "layout": self.layout, "norm_names": self.norms, "dtype": self.dtype}

    @property
    def dialect(self) -> str:
        """The dialect of the keys, the default one by name."""
        return self.layout or ("stacked" if alike(self.kind) else "per-layer")


def all_rows(kinds: tuple[str, ...]) -> Iterator[Row]:
    """The whole product, what cannot be included."""
    return (Row(*choice) for choice in product(kinds, FORMS, LAYOUTS, GRIDS, NORMS, TYPES))


@cache
def routed(kind: str) -> bool:
    """Whether a model has experts."""
    return any(".experts.experts." in key for key in expected(kind))


@cache
def experts(kind: str) -> int:
    """How many experts a layer of a model has; 0 without any."""
    config = read_config(made(kind))
    return next((config[name] for name in EXPERTS if config.get(name)), 0)


@cache
def te_only(kind: str) -> bool:
    """Whether megatron-core builds the model from Transformer Engine's layers alone: no local spec fits it."""
    return re.match(r"deepseek|kimi|qwen3-next|nemotron", kind) is not None


def can_be(row: Row) -> bool:
    """Whether there are such files; only the model forbids a value, never another value of the row."""
    tp, pp, ep, etp = row.grid
    layers = len({key.split("decoder.layers.")[1].split(".")[0] for key in expected(row.kind) if _of_decoder(key)})
    fits = pp <= layers and not any(n % tp for n in cut_by_tp(row.kind)) and not experts(row.kind) % ep
    fits = fits and (routed(row.kind) or ep * etp == 1)
    return fits and (row.layout != "stacked" or alike(row.kind)) and not (row.norms == "local" and te_only(row.kind))


def told(row: Row) -> bool:
    """Whether the oracle knows the bytes: it shifts the norms of Qwen3-Next as bfloat16 alone."""
    return row.dtype == "bfloat16" or not row.kind.startswith("qwen3-next")


@cache
def cut_by_tp(kind: str) -> list[int]:
    """The sizes of a model's config that not every grid divides."""
    config = read_config(made(kind))
    text = {**config, **config.get("text_config", {})}
    names = ("num_key_value_heads", "shared_expert_intermediate_size", "mamba_num_heads", "linear_num_key_heads")
    return [text[name] for name in names if name in text]


def _of_decoder(key: str) -> bool:
    return re.match(r"(language_model\.)?decoder\.layers\.", key) is not None


def covering(rows: list[Row]) -> list[Row]:
    """Rows that show every pair of values which any row shows; of each kind the richest rows first."""
    numbers: dict[Any, int] = {}
    masks = {}
    for row in rows:
        masks[row] = sum(1 << numbers.setdefault(pair, len(numbers)) for pair in shown(row))
    left, chosen = (1 << len(numbers)) - 1, list[Row]()
    while left:
        best = max(masks, key=lambda row: (masks[row] & left).bit_count())
        left &= ~masks[best]
        chosen.append(best)
    return sorted(chosen, key=lambda row: (row.kind, chosen.index(row)))


def shown(row: Row, strength: int = 2) -> set[Any]:
    """The combinations of values in a row."""
    return set(combinations(asdict(row).items(), strength))


def successors(rows: list[Row]) -> dict[Row, Row]:
    """After each row another one of the same model; the last goes on with the first."""
    found = {}
    for kind in {row.kind for row in rows}:
        mine = [row for row in rows if row.kind == kind]
        found |= dict(zip(mine, [*mine[1:], mine[0]], strict=True))
    return found


def wanted(row: Row, through: str = "") -> Stored:
    """Every tensor that the files must hold. through: a dtype in which the values were stored before."""
    tensors = expected(row.kind)
    if row.norms == "local":
        tensors = {_local(key): tensor for key, tensor in tensors.items()}
    if row.dialect == "singleton":
        tensors = dict(_single(row.kind, tensors))
    elif row.dialect == "stacked":
        tensors = stacked(tensors)
    return {key: _stored(key, tensor, row, through) for key, tensor in tensors.items()}


def _local(key: str) -> str:
    return re.sub(r"(layers\.\d+\.(transformer_layer\.)?)pre_mlp_layernorm\.", r"\1mlp.linear_fc1.layer_norm_", key)


def _single(kind: str, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert and each half of a gated projection by itself."""
    for key, tensor in tensors.items():
        if ".experts.experts." in key:
            numbered = key.replace(".experts.experts.", ".experts.experts.{}.")
            rows = [(numbered.format(n), each) for n, each in enumerate(tensor)]
        else:
            rows = [(key, tensor)]
        gated = re.search(r"\.linear_fc1\.(weight|bias)$", key) and not key.startswith(NOT_GATED)
        for name, each in rows:
            if gated and not kind.startswith("nemotron"):
                yield from zip((f"{name}_w", f"{name}_v"), each.chunk(2), strict=True)
            else:
                yield name, each


def _stored(key: str, tensor: torch.Tensor, row: Row, through: str) -> tuple[str, tuple[int, ...], bytes]:
    dtypes = ("float32",) if ALWAYS_FLOAT32.fullmatch(key) else filter(None, (through, row.dtype))
    for dtype in dtypes:
        tensor = tensor.to(getattr(torch, dtype))
    if key.endswith(("word_embeddings.weight", "output_layer.weight")):
        unit = lcm(128, 128 * row.grid[0])
        tensor = torch.cat([tensor, tensor.new_zeros(-len(tensor) % unit, tensor.shape[1])])
    return bits(tensor)


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """dtype, shape and bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def seen(checkpoint: Path, form: str) -> Stored:
    """Every tensor as torch reads it, or tensorstore."""
    if form == "torch_dist":
        return {key: bits(tensor) for key, tensor in loaded(checkpoint).items()}
    arrays = opened(checkpoint, form)
    return {key: (a.dtype.name, tuple(a.shape), a.read().result().tobytes()) for key, a in arrays.items()}


def opened(checkpoint: Path, form: str) -> Mapping[str, Any]:
    """Every array as tensorstore opens it."""
    documents = (checkpoint / "iter_0000000").glob(f"*/{DOCUMENTS[form]}")
    spec: Callable[[Path], dict[str, Any]] = lambda folder: {"driver": "file", "path": f"{folder}/"}  # noqa: E731
    opens = {
        path.parent.name: tensorstore.open({"driver": form, "kvstore": spec(path.parent)}, read=True)
        for path in documents
    }
    return {key: future.result() for key, future in opens.items()}


def columns(checkpoint: Path, form: str) -> dict[str, int]:
    """Into how many parts the last axis of every tensor is cut."""
    if form != "torch_dist":
        found = opened(checkpoint, form).items()
        return {key: array.shape[-1] // array.chunk_layout.write_chunk.shape[-1] for key, array in found}
    rows = dcp.FileSystemReader(checkpoint / "iter_0000000").read_metadata().state_dict_metadata.items()
    return {key: len({chunk.offsets[-1] for chunk in row.chunks}) for key, row in rows if hasattr(row, "chunks")}


def stages(checkpoint: Path) -> int:
    """How many pipeline stages wrote a torch_dist checkpoint: the first ranks of the decoder's layers."""
    places = dcp.FileSystemReader(checkpoint / "iter_0000000").read_metadata().storage_data.items()
    first: dict[int, int] = {}
    for index, place in places:
        match = re.match(r"(?:language_model\.)?decoder\.layers\.(\d+\.)?", index.fqn)
        if match and index.offset is not None:
            layer = int(match[1].rstrip(".")) if match[1] else index.offset[0]
            rank = int(place.relative_path.split("_")[2])
            first[layer] = min(rank, first.get(layer, rank))
    return len(set(first.values()))
