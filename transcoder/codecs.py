"""Weights stored as several tensors: small numbers and their scales. Geometry only; the arithmetic is in `kernels/`.

    fp8     X.weight F8_E4M3 [n, k] · X.weight_scale_inv F32 [⌈n/128⌉, ⌈k/128⌉] or one number    → X.weight [n, k]
    mxfp4   X_blocks U8 [.., n, k/32, 16] · X_scales U8 [.., n, k/32]                            → X_blocks [.., n, k]
    int4    X.weight_packed I32 [n, ⌈k/8⌉] · X.weight_scale [n, ⌈k/32⌉] · X.weight_shape [n, k]  → X.weight [n, k]

To rules a group of such tensors is one weight of a usual dtype: map and value commute. Sources: the quantisers of
transformers (finegrained_fp8, mxfp4) and compressed-tensors (pack-quantized).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.spec import DTYPES, Catalog, DType, TensorSpec

Range = tuple[int, int]  # flat elements [start, stop)
CODECS = ("fp8", "mxfp4", "int4")
FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Codec:
    """How the parts of one weight make its values; `rows`: rows of its last dimension that are encoded together."""

    name: str
    parts: tuple[TensorSpec, ...]  # the one with most bytes first
    rows: int
    shape: tuple[int, ...]
    block: tuple[int, int] = (1, 1)

    def places(self, start: int, stop: int) -> tuple[Range, ...]:
        """Where the rows [start, stop) lie in each part; start is a multiple of `rows`, stop too or the end."""
        below, above = start // self.block[0], -(-stop // self.block[0])
        if self.name == "fp8":
            scales = self.parts[1].shape[-1] if self.parts[1].shape else 1
            return (start * self.shape[-1], stop * self.shape[-1]), (below * scales, above * scales)
        lines = prod(self.shape[:-1])
        widths = [prod(part.shape) // max(1, lines) for part in self.parts[:2]]
        return (*((start * width, stop * width) for width in widths), *((0, 2) for _ in self.parts[2:]))

    def decode(self, arrays: tuple[Any, ...], target: str) -> Any:
        """The values of whole rows, flat, as raw bits of `target`; arrays: their places in the parts, flat."""
        return _DECODERS[self.name](self, arrays, target).reshape(-1)

    def encode(self, bits: Any, source: str, kept: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """The parts of whole rows from their values (flat, raw bits of `source`), each flat.

        kept: the same rows' scales in an older file, used wherever they give back exactly these values.
        """
        return _ENCODERS[self.name](self, bits, source, kept)

    def row_bands(self, nbytes: int) -> Iterator[Range]:
        """The rows in bands of at most `nbytes` of bfloat16 values, or of one block where that is more."""
        step = max(1, nbytes // max(1, 2 * self.shape[-1]) // self.rows) * self.rows
        total = prod(self.shape[:-1])
        for start in range(0, total, step):
            yield start, min(start + step, total)


@dataclass(frozen=True)
class Weights:
    """What rules see of a Hugging Face directory: every weight by name, and the codecs of those that have one."""

    catalog: Catalog
    codecs: Mapping[str, Codec]


def weights_of(catalog: Catalog, config: Mapping[str, Any]) -> Weights:
    """The weights that the tensors of `catalog` are. Raises InputError for a part that lacks its partner."""
    usual = _usual_dtype(config)
    codecs = dict(_codecs(catalog, config))
    parts = {part.name for codec in codecs.values() for part in codec.parts}
    problems = [
        Problem(file=spec.chunks[0].file, tensor=name, found=spec.dtype.name, expected=_partner(name, spec))
        for name, spec in catalog.items()
        if name not in parts and _partner(name, spec)
    ]
    problems += [
        Problem(file=catalog[name].chunks[0].file, tensor=name, expected="either", found=f"also {codec.parts[0].name}")
        for name, codec in codecs.items()
        if name in catalog and name not in parts
    ]
    if problems:
        raise refuse("quantised", f"{len(problems)} tensors of quantised weights lack their partner", problems)
    found = {name: spec for name, spec in catalog.items() if name not in parts}
    found |= {name: codec.parts[0].known_as(name, usual, codec.shape) for name, codec in codecs.items()}
    return Weights(found, codecs)


def not_quantised(weights: Weights, config: Mapping[str, Any]) -> list[str]:
    """A warning when the config speaks of quantised weights and the files hold none."""
    method = _quantisation(config).get("quant_method")
    return (
        [f"config.json has a quantization_config ({method!r:.40}), the files hold no such weights"]
        if (method is not None and not weights.codecs)
        else []
    )


def _usual_dtype(config: Mapping[str, Any]) -> DType:
    """The dtype that quantised weights are decoded to: the config's."""
    for table in (config, config.get("text_config")):
        name = (table.get("dtype") or table.get("torch_dtype")) if isinstance(table, dict) else None
        if name in FLOATS:
            return DTYPES[str(name)]
    return DTYPES["bfloat16"]


def _partner(name: str, spec: TensorSpec) -> str:
    """What a part of a quantised weight lacks when nothing claimed it; empty for an ordinary tensor."""
    if spec.dtype.name.startswith("float8"):
        return f"e4m3 with a partner {name}_scale_inv"
    if name.endswith("_scale_inv"):
        return f"{name.removesuffix('_scale_inv')} in FP8"
    if name.endswith("_blocks") and spec.dtype.name == "uint8":
        return name.removesuffix("_blocks") + "_scales beside it"
    if name.endswith("_scales") and spec.dtype.name == "uint8":
        return name.removesuffix("_scales") + "_blocks beside it"
    if name.endswith((".weight_packed", ".weight_scale", ".weight_shape")):
        return "weight_packed, weight_scale and weight_shape together"
    return ""


def _codecs(catalog: Catalog, config: Mapping[str, Any]) -> Iterator[tuple[str, Codec]]:
    block = _fp8_block(config)
    for name, spec in catalog.items():
        if spec.dtype.name == "float8_e4m3fn" and (scale := catalog.get(f"{name}_scale_inv")):
            yield name, _fp8(spec, scale, block)
        elif spec.dtype.name == "uint8" and name.endswith("_blocks"):
            if scale := catalog.get(name.removesuffix("_blocks") + "_scales"):
                yield name, _mxfp4(spec, scale)
        elif name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")
            scale, shape = catalog.get(f"{stem}_scale"), catalog.get(f"{stem}_shape")
            if scale and shape:
                yield stem, _int4(spec, scale, shape, _int4_group(config))


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for table in (config, config.get("text_config")):
        found = table.get("quantization_config") if isinstance(table, dict) else None
        if isinstance(found, dict):
            return found
    return {}


def _fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    sizes = _quantisation(config).get("weight_block_size", [128, 128])
    if sizes is None:  # one scale for each tensor
        return 128, 128
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and 0 < n <= 4096 for n in sizes):
        problem = Problem(
            file="config.json", found=f"weight_block_size {sizes!r:.80}", expected="two positive integers"
        )
        raise refuse("quantised", "the config does not describe the quantised weights", [problem])
    return sizes[0], sizes[1]


def _int4_group(config: Mapping[str, Any]) -> Any:
    groups = _quantisation(config).get("config_groups", {})
    tables = list(groups.values()) if isinstance(groups, dict) else [None]
    weights = [table.get("weights") if isinstance(table, dict) else None for table in tables]
    sizes = [table.get("group_size") if isinstance(table, dict) else None for table in weights] or [32]
    found = sizes[0]
    fits = type(found) is int and 0 < found <= 4096 and all(size == found for size in sizes)
    if not fits or any(_unusual(table) for table in weights if isinstance(table, dict)):
        problem = Problem(
            file="config.json", found=repr(groups)[:200], expected="4-bit symmetric integers, one group size"
        )
        raise refuse("quantised", "the config does not describe weights that can be decoded", [problem])
    return found


def _unusual(table: Mapping[str, Any]) -> bool:
    return table.get("num_bits", 4) != 4 or table.get("type", "int") != "int" or table.get("symmetric") is False


def _fp8(weight: TensorSpec, scale: TensorSpec, block: tuple[int, int]) -> Codec:
    rows, used, expected = _fp8_blocks(weight.shape, scale.shape, block)
    if not rows or scale.dtype.name != "float32":
        _misfit(weight, scale, f"float32 {list(expected)}, one number for every {used[0]} × {used[1]} weights")
    return Codec("fp8", (weight, scale), rows, weight.shape, used)


@lru_cache(maxsize=4096)
def _fp8_blocks(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, tuple[int, int], tuple[int, ...]]:
    """Rows that are encoded together, 0 where the scales do not fit; the block of one scale; the scales' shape."""
    expected = tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
    if single := prod(scales) == 1 != prod(expected):
        block, expected = (max(1, prod(shape[:-1])), shape[-1] if shape else 1), (1, 1)
    fits = len(shape) == 2 and (scales == expected or prod(scales) == prod(expected) == 1)
    return (1 if single else block[0]) if fits else 0, block, expected


def _mxfp4(blocks: TensorSpec, scales: TensorSpec) -> Codec:
    if len(blocks.shape) < 3 or blocks.shape[-1] != 16 or scales.dtype.name != "uint8":
        _misfit(blocks, scales, "blocks [.., k/32, 16] and scales [.., k/32] of uint8")
    if scales.shape != blocks.shape[:-1]:
        _misfit(blocks, scales, f"uint8 {list(blocks.shape[:-1])}, one for 32 weights")
    return Codec("mxfp4", (blocks, scales), 1, (*blocks.shape[:-2], blocks.shape[-2] * 32))


def _int4(packed: TensorSpec, scale: TensorSpec, shape: TensorSpec, group: int) -> Codec:
    fits = len(packed.shape) == 2 == len(scale.shape) and packed.dtype.name == "int32"
    if shape.shape != (2,) or shape.dtype.name not in ("int32", "int64"):
        _misfit(packed, shape, "two integers")
    if not fits or scale.dtype.name not in FLOATS:
        _misfit(packed, scale, "int32 [n, k/8] and a scale for each group")
    columns = scale.shape[1] * group  # the last group is whole in every published file
    if scale.shape[0] != packed.shape[0] or packed.shape[1] != -(-columns // 8):
        _misfit(packed, scale, f"[{packed.shape[0]}, {packed.shape[1] * 8 // group}], one for {group} weights")
    return Codec("int4", (packed, scale, shape), 1, (packed.shape[0], columns), (1, group))


def _misfit(weight: TensorSpec, scale: TensorSpec, expected: str) -> None:
    found = f"{scale.dtype.name} {list(scale.shape)} beside {weight.dtype.name} {list(weight.shape)}"
    problem = Problem(file=scale.chunks[0].file, tensor=scale.name, expected=expected, found=found)
    raise refuse("quantised", "the scales do not fit their weight", [problem])


def _decode_fp8(codec: Codec, arrays: tuple[Any, ...], target: str) -> Any:
    from transcoder.kernels import fp8

    weight, scales = arrays[0].reshape(-1, codec.shape[-1]), arrays[1].view("<f4")
    return fp8.decode(weight, scales.reshape(-(-weight.shape[0] // codec.block[0]), -1), codec.block, target)


def _encode_fp8(codec: Codec, bits: Any, source: str, kept: tuple[Any, ...] | None) -> tuple[Any, ...]:
    from transcoder.kernels import fp8

    rows = bits.reshape(-1, codec.shape[-1])
    scales = kept[0].view("<f4").reshape(-(-rows.shape[0] // codec.block[0]), -1) if kept else None
    weight, fresh = fp8.encode(rows, source, codec.block, scales)
    if codec.rows == 1 < codec.shape[0] and (scales is None or fresh.tobytes() != scales.tobytes()):
        problem = Problem(
            tensor=codec.parts[0].name, expected="values that its one scale can give", found="other values"
        )
        raise refuse("quantised", "the values changed, and one scale for a whole tensor is not found anew", [problem])
    return weight.reshape(-1), fresh.view("<u4").reshape(-1)


def _decode_mxfp4(codec: Codec, arrays: tuple[Any, ...], target: str) -> Any:
    from transcoder.kernels import mxfp4

    scales = arrays[1].reshape(-1, codec.shape[-1] // 32)
    return mxfp4.decode(arrays[0].reshape(*scales.shape, 16), scales, target)


def _encode_mxfp4(codec: Codec, bits: Any, source: str, kept: tuple[Any, ...] | None) -> tuple[Any, ...]:
    from transcoder.kernels import mxfp4

    rows = bits.reshape(-1, codec.shape[-1])
    scales = kept[0].reshape(-1, codec.shape[-1] // 32) if kept else None
    blocks, fresh = mxfp4.encode(rows, source, scales)
    return blocks.reshape(-1), fresh.reshape(-1)


def _decode_int4(codec: Codec, arrays: tuple[Any, ...], target: str) -> Any:
    from transcoder.kernels import int4

    _, scale, shape = codec.parts
    if (found := arrays[2].view(f"<i{shape.dtype.size}").tolist()) != list(codec.shape):
        problem = Problem(
            file=shape.chunks[0].file, tensor=shape.name, expected=str(list(codec.shape)), found=str(found)
        )
        raise refuse("quantised", "a weight has another shape than its parts", [problem])
    lines = arrays[0].size // codec.parts[0].shape[1]
    packed, scales = arrays[0].reshape(lines, -1), arrays[1].reshape(lines, -1)
    return int4.decode(packed, scales, scale.dtype.name, codec.shape[1], codec.block[1], target)


def _encode_int4(codec: Codec, bits: Any, source: str, kept: tuple[Any, ...] | None) -> tuple[Any, ...]:
    import numpy as np

    from transcoder.kernels import int4

    _, scale, shape = codec.parts
    rows = bits.reshape(-1, codec.shape[1])
    scales = kept[0].reshape(rows.shape[0], -1) if kept else None
    packed, fresh = int4.encode(rows, source, codec.block[1], scales, scale.dtype.name)
    return packed.reshape(-1), fresh.reshape(-1), np.array(codec.shape, f"<u{shape.dtype.size}")


_DECODERS = {"fp8": _decode_fp8, "mxfp4": _decode_mxfp4, "int4": _decode_int4}
_ENCODERS = {"fp8": _encode_fp8, "mxfp4": _encode_mxfp4, "int4": _encode_int4}
