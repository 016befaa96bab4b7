"""Images from files and URLs, and their patches as Qwen2-VL's processor cuts them, with Pillow and NumPy alone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from transcoder.errors import InputError, Problem, refuse
from transcoder.hfconfig import CONFIG_LIMIT, read_json

IMAGE_LIMIT = 64 << 20  # bytes
TIMEOUT = 20.0  # seconds
RATIO_LIMIT = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
Grid = tuple[int, int, int]  # time, rows and columns of patches


@dataclass(frozen=True)
class ImageSettings:
    """The numbers of preprocessor_config.json; the defaults are those of transformers' processor."""

    patch: int = 14
    merge: int = 2
    frames: int = 2
    least: int = 56 * 56  # pixels
    most: int = 28 * 28 * 1280  # pixels
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = BICUBIC


def read_settings(folder: Path) -> ImageSettings:
    """The settings that a Hugging Face directory carries, in either of the two files that may hold them."""
    table: Mapping[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name, CONFIG_LIMIT)
            table = {**table, **(found.get("image_processor") or (found if name.startswith("pre") else {}))}
    return settings_of(table)


def settings_of(table: Mapping[str, Any]) -> ImageSettings:
    """The settings in a parsed preprocessor_config.json. Raises InputError for what is not supported."""
    size, default = table.get("size") or {}, ImageSettings()
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if table.get(name) is False]
    if off:
        raise refuse("image", f"preprocessor_config.json turns {', '.join(off)} off, which is not supported")
    return ImageSettings(
        patch=int(table.get("patch_size", default.patch)),
        merge=int(table.get("merge_size", default.merge)),
        frames=int(table.get("temporal_patch_size", default.frames)),
        least=int(table.get("min_pixels") or size.get("shortest_edge") or default.least),
        most=int(table.get("max_pixels") or size.get("longest_edge") or default.most),
        scale=float(table.get("rescale_factor", default.scale)),
        mean=tuple(table.get("image_mean") or default.mean),
        std=tuple(table.get("image_std") or default.std),
        resample=int(table.get("resample", default.resample)),
    )


def fetch(source: str) -> bytes:
    """The bytes of an image file or of an http(s) URL. Raises InputError naming it."""
    try:
        if urlsplit(source).scheme in ("http", "https"):
            with urlopen(source, timeout=TIMEOUT) as answer:
                data: bytes = answer.read(IMAGE_LIMIT + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(IMAGE_LIMIT + 1)
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise _unreadable(source, str(getattr(error, "strerror", None) or error)) from error
    if len(data) > IMAGE_LIMIT:
        raise _unreadable(source, f"larger than {IMAGE_LIMIT >> 20} MiB")
    return data


def _unreadable(source: str, reason: str) -> InputError:
    return refuse("image", "cannot read an image", [Problem(file=source, message=reason)])


def decode(data: bytes, source: str) -> Any:
    """The picture, upright and in RGB. Raises InputError naming the source."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(
            source, "not an image that Pillow can read" if "BytesIO" in str(error) else str(error)
        ) from error


def target_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Height and width in pixels after resizing: multiples of a merged patch, within the limits, nearly the same ratio.

    >>> target_size(480, 640, ImageSettings())
    (476, 644)
    """
    unit = settings.patch * settings.merge
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > settings.most:
        shrink = math.sqrt(height * width / settings.most)
        rows, columns = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif rows * columns < settings.least:
        grow = math.sqrt(settings.least / (height * width))
        rows, columns = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return rows, columns


def patches(image: Any, settings: ImageSettings) -> tuple[NDArray[np.float32], Grid]:
    """Flat patches [rows * columns, channels * frames * patch * patch] of an RGB picture, merged blocks together."""
    height, width = target_size(image.height, image.width, settings)
    pixels = np.asarray(image.resize((width, height), resample=settings.resample)).astype(np.float64)
    scaled = (pixels * settings.scale).astype(np.float32)
    mean, std = (np.array(each, np.float32) for each in (settings.mean, settings.std))
    normal = (scaled - mean) / std
    side, merge = settings.patch, settings.merge
    rows, columns = height // side, width // side
    blocks = normal.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    ordered = np.repeat(ordered, settings.frames, axis=5)
    return np.ascontiguousarray(ordered.reshape(rows * columns, -1)), (1, rows, columns)


def prepare(sources: tuple[str, ...], settings: ImageSettings) -> tuple[NDArray[np.float32], tuple[Grid, ...]]:
    """The patches of all images, one after the other, and each image's grid. Raises InputError naming the image."""
    made = []
    for source in sources:
        image = decode(fetch(source), source)
        if max(image.size) > RATIO_LIMIT * min(image.size):
            raise _unreadable(
                source, f"{image.width} x {image.height} pixels; one side is over {RATIO_LIMIT} times the other"
            )
        made.append(patches(image, settings))
    return np.concatenate([part for part, _ in made]), tuple(grid for _, grid in made)
