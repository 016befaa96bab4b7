"""What a conversion would do, decided and proved from headers and metadata alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transcoder.errors import PathLike, UsageError
from transcoder.mesh import Mesh
from transcoder.places import place

if TYPE_CHECKING:
    from transcoder.exportplan import ExportPlan
    from transcoder.importing import ImportPlan
    from transcoder.resharding import ReshardPlan

MAX_SHARD = 5_000_000_000  # bytes


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: a plan is a million objects without cycles, which would be looked at again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def plan_hf2mcore(
    src: PathLike,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    layout: str = "",
    dtype: str = "",
    make_vocab_size_divisible_by: int = 128,
    iteration: int | str = "both",
    arch: str = "",
    norm_names: str = "te",
    mtp: str = "keep",
    merge_adapter: PathLike | None = None,
    hf_model: PathLike | None = None,
    lora_form: str = "canonical",
    follow_links: bool = False,
    format: str = "torch_dist",
) -> ImportPlan:
    """The plan of an import, decided and proved from headers and config alone. Raises TranscoderError.

    tp, pp, ep, etp: sizes of tensor, pipeline, expert and expert-tensor parallelism. layout: one of the key dialects
    `stacked`, `per-layer` and `singleton`; by default what Megatron itself uses.
    iteration: `both`, `release` or a number. arch: the Hugging Face class, when the config does not name it.
    mtp: `keep` or `drop` the layers of multi-token prediction. format: `torch_dist`, `zarr` or `zarr3`.
    merge_adapter: directory of a PEFT adapter that is merged into the weights, in float32.
    hf_model, lora_form: where `src` is a PEFT adapter, its base model, and whether each part of a fused module gets an
    adapter (`canonical`) or all parts one (`fused`).
    """
    from transcoder.formats.peft import is_peft
    from transcoder.importing import plan_import
    from transcoder.mapped import reading

    source = place(src)
    with reading(source), _uncollected():
        if is_peft(source):
            from transcoder.adapterplans import Choices, plan_adapter_import

            if merge_adapter:
                raise UsageError("adapters are merged into models: give the model as SRC", kind="adapter")
            choices = Choices(layout, dtype, lora_form, iteration, format)
            base = place(hf_model) if hf_model else None
            divisor = make_vocab_size_divisible_by
            return plan_adapter_import(source, Mesh(tp, pp, ep, etp), base, arch, choices, divisor, follow_links)
        if hf_model:
            raise UsageError("--hf-model is for adapters, which need their base model", kind="usage")
        return plan_import(
            source,
            Mesh(tp, pp, ep, etp),
            layout=layout,
            dtype=dtype,
            divisor=make_vocab_size_divisible_by,
            iteration=iteration,
            arch=arch,
            norm_names=norm_names,
            mtp=mtp,
            merge_adapter=place(merge_adapter) if merge_adapter else None,
            follow_links=follow_links,
            form=format,
        )


def plan_mcore2hf(
    src: PathLike,
    *,
    hf_model: PathLike | None = None,
    arch: str = "",
    dtype: str = "",
    expert_layout: str = "like-source",
    max_shard_size: int | str = MAX_SHARD,
    quantize: str = "",
    merge_adapter: PathLike | None = None,
    follow_links: bool = False,
) -> ExportPlan:
    """The plan of an export, decided and proved from metadata alone. Raises TranscoderError.

    hf_model: directory whose config, tokenizer and shard map are used. max_shard_size: bytes, or a text such as 5GB.
    quantize: `like-source` to write small numbers with scales where the original has them.
    merge_adapter: as in `plan_hf2mcore`.
    """
    from transcoder.adapterplans import is_adapter_checkpoint, plan_adapter_export
    from transcoder.exportplan import plan_export
    from transcoder.mapped import reading
    from transcoder.megatron import open_megatron
    from transcoder.reports import size_of

    source, reference = place(src), place(hf_model) if hf_model else None
    if quantize not in ("", "like-source"):
        raise UsageError(f"quantize {quantize!r}: give like-source or nothing", kind="quantize")
    layout = "" if expert_layout == "like-source" else expert_layout
    with reading(source), _uncollected():
        if is_adapter_checkpoint(source):
            if merge_adapter or quantize:
                raise UsageError("an adapter is neither merged nor quantised: give the model as SRC", kind="adapter")
            return plan_adapter_export(source, reference, arch, dtype, layout)
        megatron = open_megatron(source, reference, arch, layout, bool(quantize), follow_links=follow_links)
        return plan_export(
            megatron,
            dtype=dtype,
            max_shard=size_of(max_shard_size),
            quantised=bool(quantize),
            merge_adapter=place(merge_adapter) if merge_adapter else None,
            follow_links=follow_links,
        )


def plan_reshard(
    src: PathLike,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    layout: str = "",
    norm_names: str = "",
    dtype: str = "",
    make_vocab_size_divisible_by: int = 128,
    iteration: int | str = "both",
    hf_model: PathLike | None = None,
    arch: str = "",
    link: bool = False,
    format: str = "torch_dist",
) -> ReshardPlan:
    """The plan of Megatron → Megatron, decided and proved from metadata alone. Raises TranscoderError.

    tp, pp, ep, etp: the new grid. layout, norm_names, dtype: as the source has them, by default. hf_model, arch: as in
    `plan_mcore2hf`, for checkpoints that do not say what they hold. link: hard-link the payload files, where no byte of
    them has to change; the grid is then only what common.pt says of it. format: as in `plan_hf2mcore`.
    """
    from transcoder import resharding
    from transcoder.mapped import reading

    source = place(src)
    with reading(source), _uncollected():
        return resharding.plan_reshard(
            source,
            Mesh(tp, pp, ep, etp),
            hf_model=place(hf_model) if hf_model else None,
            arch=arch,
            layout=layout,
            norm_names=norm_names,
            dtype=dtype,
            divisor=make_vocab_size_divisible_by,
            iteration=iteration,
            link=link,
            form=format,
        )
