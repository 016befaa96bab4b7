"""Fills a live megatron-core model from a Hugging Face directory or a Megatron checkpoint, this rank's bytes only.

The model is a catalog whose chunks are boxes of memory. Everything is decided and compared first; then each range is
read where it belongs, so that memory beyond the parameters stays under 32 MiB. No collectives: ranks work alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transcoder.errors import PathLike
from transcoder.formats.huggingface import is_hf
from transcoder.runtime.from_hf import fill_from_hf
from transcoder.runtime.from_megatron import fill_from_megatron
from transcoder.runtime.omitted import remarks


def load(
    model: Any,
    path: PathLike,
    hf_model: PathLike | None = None,
    *,
    verify: bool = False,
    follow_links: bool = False,
) -> dict[str, Any]:
    """Fill a live model of this rank in place.

    Returns `bytes_read`, `parameters` (elements of this rank), `seconds`, and what this rank's stage could have taken
    and did not: `left_out`, the names of tensors, and `warnings`, which say so. Layers of multi-token prediction may
    be left out as a whole, and nothing else.

    model: what megatron-core builds, or a list of its chunks, wrapped for training or not; every layer spec and grid.
    path: a Hugging Face directory (quantised weights are decoded) or a torch_dist checkpoint in any key dialect.
    hf_model: where the vocabulary's size is read when a Megatron checkpoint does not carry its config. verify: read
    the Megatron chunks that are touched twice, comparing their checksums first. Elements take the model's type.
    Raises InputError when a tensor of the model is not in the source, or one of the source that belongs to this
    rank's stage is not in the model; then nothing has been written. Optimizers that keep copies must be told.
    """
    started = time.monotonic()
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    if is_hf(Path(path)):
        done = fill_from_hf(chunks, Path(path), follow_links)
    else:
        reference = Path(hf_model) if hf_model else None
        done = fill_from_megatron(chunks, Path(path), reference, verify)
    told = {"left_out": list(done.left_out), "warnings": remarks(done.left_out)}
    return {"bytes_read": done.bytes_read, "parameters": done.parameters, "seconds": time.monotonic() - started, **told}
