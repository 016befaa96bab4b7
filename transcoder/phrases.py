"""What the commands say on stdout: the phrases that scripts around Megatron grep for, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from transcoder.places import place

Report = Mapping[str, Any]
SIZES = {
    "tp": "Tensor parallel size",
    "pp": "Pipeline parallel size",
    "ep": "Expert parallel size",
    "etp": "Expert tensor parallel size",
}


def bridge(report: Report) -> str:
    """The name under which Megatron Bridge knows the architecture.

    >>> bridge({"architecture": "LlamaForCausalLM"})
    'LlamaBridge'
    """
    return f"{report['architecture'].split('For', 1)[0]}Bridge"


def _all_of(report: Report) -> str:
    count = report["megatron_parameters"]
    return f"100% ({count}/{count}) {bridge(report)}"


def import_start(src: str, dst: str) -> Iterator[str]:
    """Before an import."""
    yield f"🔄 Starting import: {src} -> {dst}"
    yield "📥 Loading HuggingFace model"


def parallel(report: Report) -> Iterator[str]:
    """The four sizes of the grid, and the parameters on each of its ranks."""
    for name, label in SIZES.items():
        yield f"{label}: {report['parallel'][name]}"
    for row in report["rank_parameters"]:
        place = f"({row['tp']}, {row['pp']})"
        yield f" > number of parameters on (tensor, pipeline) model parallel rank {place}: {row['parameters']}"


def import_end(report: Report) -> Iterator[str]:
    """After an import: counts, the tree that was written, and the commands that load it."""
    yield from parallel(report)
    yield f"Loading from {report['source']} … {_all_of(report)}"
    grid = f"[ t 1/{report['parallel']['tp']}, p 1/{report['parallel']['pp']} ]"
    yield f"  successfully saved checkpoint from iteration {report['iteration']:>7} to {report['destination']} {grid}"
    yield f"✅ Successfully imported model to: {report['destination']}"
    yield "📁 Checkpoint structure:"
    yield from (f"   {entry}" for entry in _entries(place(report["destination"])))
    yield from next_steps(report)


def _entries(folder: Path) -> list[str]:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f"🔗 {e.name}" if e.is_symlink() else f"📂 {e.name}/" if e.is_dir() else f"📄 {e.name}" for e in entries]


def next_steps(report: Report) -> Iterator[str]:
    """The commands that load an imported checkpoint, with its real path."""
    path, source = _absolute(report["destination"]), _absolute(report["source"])
    inner = f"{path}/{report['folder']}"
    root, folder, model = quote(path), quote(inner), quote(source)
    dtype = {"bfloat16": " --bf16", "float16": " --fp16"}.get(report["dtype"], "")
    extra = "".join(f" {flag}" for flag in report["megatron_flags"])
    yield "Load it with"
    if report["format"] == "zarr3":
        url = inner if "://" in inner else f"file://{inner}"
        yield f'  tensorstore      {{"driver": "zarr3", "kvstore": "{url}/KEY/"}}'
        return
    yield f"  Megatron-LM      pretrain_gpt.py --load {root} --use-checkpoint-args --finetune{dtype}{extra} …"
    if report["format"] == "zarr":
        return
    yield f"  Megatron Bridge  checkpoint.pretrained_checkpoint={root}, or bridge.load_megatron_model({inner!r})"
    yield (
        "  verl             actor_rollout_ref.actor.megatron.use_dist_checkpointing=True "
        f"actor_rollout_ref.actor.megatron.dist_checkpointing_path={folder}"
    )
    yield f"  slime            --hf-checkpoint {model} --ref-load {root}"


def _absolute(text: str) -> str:
    return text if "://" in text else str(Path(text).absolute())


def export_start(src: str, dst: str) -> Iterator[str]:
    """Before an export."""
    yield f"🔄 Starting export: {src} -> {dst}"


def export_end(report: Report) -> Iterator[str]:
    """After an export."""
    yield f"Converting to HuggingFace … {_all_of(report)}"
    yield f"Saving HF-ckpt in {report['destination']}..."
    yield "Success: All tensors from the original checkpoint were written."
    yield f"✅ Successfully exported model to: {report['destination']}"


def reshard_end(report: Report) -> Iterator[str]:
    """After Megatron → Megatron."""
    yield from parallel(report)
    yield f"Loading from {report['source']} … {_all_of(report)}"
    grid = f"[ t 1/{report['parallel']['tp']}, p 1/{report['parallel']['pp']} ]"
    yield f"  successfully saved checkpoint from iteration {report['iteration']:>7} to {report['destination']} {grid}"
    yield f"✅ Resharded to: {report['destination']} ({report['layout']} keys, {report['dtype']})"


def roundtrip_end(report: Report) -> Iterator[str]:
    """After a round trip: sizes, the table of tensors, and where the result lies."""
    yield from parallel(report)
    yield f"Loading from {report['source']} … {_all_of(report)}"
    yield f"Converting to HuggingFace … {_all_of(report)}"
    yield from _table(report["verified"])
    if report["destination"]:
        yield f"Saving HF-ckpt in {report['destination']}..."
    yield "Success: All tensors from the original checkpoint were written."


def architectures(report: Report) -> Iterator[str]:
    """The supported architectures as a numbered list, with what tests prove of each."""
    width = max(len(row["name"]) for row in report["architectures"])
    yield f"✅ Found {len(report['architectures'])} supported model architecture(s):"
    for number, row in enumerate(report["architectures"], 1):
        proved = ", ".join(claim for claim, holds in row["proved"].items() if holds)
        yield f"{number:>3}. {row['name']:<{width}}  {proved}".rstrip()
    yield "Convert one with: transcode hf2mcore SRC DST --tp N --pp N"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    width = max([len(row["tensor"]) for row in rows] + [len("Weight Name")])
    yield f"{'Hugging Face Weights Verification':^{width + 54}}".rstrip()
    yield f"{'Weight Name':<{width}}  {'Shape':<18} {'DType':<10} {'Device':<7} Matches Original"
    for row in rows:
        shape = "(" + ", ".join(map(str, row["shape"])) + ")"
        match = "✅" if row["matches"] else "❌"
        yield f"{row['tensor']:<{width}}  {shape:<18} {row['dtype']:<10} {'cpu':<7} {match}"
