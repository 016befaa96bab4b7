"""Hugging Face against megatron-core on one prompt: both forwards, the numbers, the verdict, the first divergence."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from transcoder.errors import UsageError
from transcoder.hfconfig import normalise, read_config
from transcoder.mesh import Mesh
from transcoder.runtime import divergence, drawing, generation, reference, text, verdict
from transcoder.runtime.config import check_grid, is_multimodal
from transcoder.runtime.device import init_parallel
from transcoder.runtime.fields import fields_of
from transcoder.runtime.gradients import differentiate
from transcoder.runtime.hooks import HfRecorder, MegatronRecorder, Record, write_log
from transcoder.runtime.load import load
from transcoder.runtime.model import build_model, stage_forward
from transcoder.runtime.pairing import pair
from transcoder.runtime.printing import Printer
from transcoder.runtime.process import exchanged, place, shared, waiting_room
from transcoder.runtime.session import Chosen, Conversation, Request, choose_dtype, open_model, ran, speaks
from transcoder.runtime.voice import Voice

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how a config calls their number


@dataclass(frozen=True)
class Watch:
    """What is recorded beside the logits, and where it goes."""

    logs: bool = False
    backward: bool = False
    folder: Path = Path()
    html: Path | None = None

    @property
    def on(self) -> bool:
        """Whether anything is recorded."""
        return self.logs or self.backward or self.html is not None


@dataclass
class Outcome:
    """What one side gave: logits by type, records of its judged forward, names of its modules."""

    logits: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    backward: list[Record] = field(default_factory=list)
    modules: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)


class Whole(Conversation):
    """A prompt of which the logits of every position count."""

    def forward(self) -> Any:
        """Logits [1, positions, vocabulary] on the last stage, however long the prompt is; None on the others."""
        tokens = torch.tensor([self.ids], device=self.device)
        placed = self.positions.between(0, len(self.ids), self.device) if self.positions else None
        return stage_forward(self.stage, tokens, placed, embeddings=self.embeddings(tokens, 0))


def run(
    asked: generation.Asked, hf: str, megatron: str | None, mesh: Mesh, options: Mapping[str, Any], voice: Voice
) -> int:
    """Compare, tell, write logs. options: of the command line. Returns 0, or 5 when the verdict is a failure."""
    folder, weights = generation.locate(hf, megatron)
    config, watch = read_config(folder), watch_of(options)
    dtype = choose_dtype(config, options["dtype"], options["device"], options["exact"])
    tokenizer = text.load_tokenizer(folder)
    requests = generation.make_requests(asked, folder, config, tokenizer) if place().rank == 0 else []
    enter(config, mesh, watch)
    (request,) = shared(requests)
    printer = Printer(tokenizer, request, voice, options["verbose"]) if speaks() else None
    chosen = Chosen(folder, weights, mesh, dtype, options["device"], options["exact"])
    return 0 if compare(config, chosen, request, watch, printer, options["model_class"]) else 5


def enter(config: dict[str, Any], mesh: Mesh, watch: Watch) -> None:
    """Join the grid, so that every process knows whether it speaks. Raises UsageError."""
    if watch.backward and is_multimodal(config):
        raise UsageError("--backward: gradients are recorded of models for text", kind="backward")
    if watch.backward and mesh.ep * mesh.etp > 1:
        raise UsageError("--backward: experts must stay on one rank; leave --ep and --etp at 1", kind="backward")
    if watch.backward and mesh.tp > 1 and fields_of(config, whole=False).get("multi_latent_attention"):
        # it leaves the gradients of rotary keys, which all heads share, on the ranks of the heads
        message = "--backward: megatron-core's latent attention needs all heads on one rank; leave --tp at 1"
        raise UsageError(message, kind="backward")
    check_grid(normalise(config), mesh, place().world)
    init_parallel(mesh)
    if place().world > 1:
        waiting_room()  # made before one rank comes late


def compare(
    config: dict[str, Any], chosen: Chosen, request: Request, watch: Watch, printer: Printer | None, name: str | None
) -> bool:
    """Whether both sides agree, on every rank; the one with a printer runs transformers and prints."""
    judged, theirs, started = judged_type(config, chosen.dtype), Outcome(), time.monotonic()
    if printer:
        printer.begin()
        theirs = run_reference(config, chosen, request, judged, watch, name)
        printer.side("HF", theirs.logits[chosen.dtype])
    ours = run_megatron(config, chosen, request, judged, watch, from_speaker(theirs.modules if printer else None))
    records = gathered(ours.records) if watch.on else []
    _write(watch, theirs, ours, printer is not None)
    if not printer:
        return bool(from_speaker(None))
    printer.voice.warn(ours.warnings)
    printer.side("Megatron", ours.logits[chosen.dtype])
    near = verdict.measure(theirs.logits[chosen.dtype], ours.logits[chosen.dtype])
    checks = list(checks_of(theirs.logits, ours.logits, chosen.dtype, judged, near))
    compared = divergence.compare(theirs.records, records) if watch.on else []
    printer.end(near, checks, compared)
    if watch.html is not None:
        drawing.write(watch.html, compared, f"{request.prompt!r} in {judged}")
    printer.conclude(near, checks, compared, ran(config, chosen, started, ours.warnings))
    return bool(from_speaker(all(check.holds for check in checks)))


def judged_type(config: Mapping[str, Any], dtype: str) -> str:
    """The type whose logits decide: routers turn the smallest difference into another choice of experts."""
    return "float32" if any(config.get(name) for name in EXPERTS) else dtype


def watch_of(options: Mapping[str, Any]) -> Watch:
    """What the options ask to record."""
    folder, html = Path(options["log_dir"] or "."), options["html"]
    return Watch(
        bool(options["enable_debug_hooks"]), bool(options["backward"]), folder, Path(html) if html is not None else None
    )


def run_reference(
    config: dict[str, Any], chosen: Chosen, request: Request, judged: str, watch: Watch, name: str | None
) -> Outcome:
    """Logits in the asked type and in float32 with the same rounded weights."""
    model = reference.load_reference(chosen.folder, config, name, chosen.dtype, chosen.device)
    inputs = reference.inputs_of(config, request, chosen.device)
    found = Outcome(modules=frozenset(each for each, _ in model.named_modules()))
    for dtype in dict.fromkeys((chosen.dtype, "float32")):
        model = model if dtype == chosen.dtype else reference.widen(model)
        recorder = HfRecorder(model, "hf", watch.backward) if watch.on and dtype == judged else None
        found.logits[dtype] = reference.logits_of(model, inputs)
        if recorder:
            forward = list(recorder.records)
            if watch.backward:
                reference.next_token_loss(model(**inputs).logits[0], request.ids).backward()
            recorder.close()
            found.records, found.backward = forward, recorder.backward
    return found


def run_megatron(
    config: dict[str, Any], chosen: Chosen, request: Request, judged: str, watch: Watch, modules: frozenset[str]
) -> Outcome:
    """Logits of this rank, where it has them, in the asked type and in the one that is judged."""
    found = Outcome()
    for dtype in dict.fromkeys((chosen.dtype, judged)):
        found.warnings.clear()  # every type leaves out the same
        model = open_model(config, replace(chosen, dtype=dtype), found.warnings.extend)
        if dtype != chosen.dtype:
            _round(model, chosen.dtype)
        talk = Whole(model, config, request, len(request.ids), cached=False)
        recorder = None
        if watch.on and dtype == judged:
            recorder = MegatronRecorder(talk.stage, pair(talk.stage, chosen.folder, modules))
        logits = talk.forward()
        found.logits[dtype] = None if logits is None else logits[0]
        if recorder:
            recorder.close()
            found.records = recorder.records
        del model, talk, recorder
        gc.collect()
    if watch.backward:
        found.backward = _backward(config, replace(chosen, dtype=judged), request)
    return found


def _round(model: Any, dtype: str) -> None:
    """Round the weights to a type and keep their own."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).to(parameter.dtype)


def _backward(config: dict[str, Any], chosen: Chosen, request: Request) -> list[Record]:
    """Gradients of the model as megatron-core differentiates it, without the shortcuts of inference."""
    model = build_model(config, chosen.mesh, chosen.dtype, device=chosen.device)
    load(model, chosen.weights, chosen.folder)
    recorder = MegatronRecorder(model, {}, gradients=True)
    differentiate(model, request.ids)
    recorder.close()
    return recorder.backward


def gathered(records: list[Record]) -> list[Record]:
    """The records of all ranks, in the order of ranks."""
    return [record for part in exchanged(records) for record in part]


def from_speaker(value: Any) -> Any:
    """The value of the one rank that has one, for which the others wait while it works."""
    return next((part for part in exchanged(value) if part is not None), None)


def _write(watch: Watch, theirs: Outcome, ours: Outcome, speaker: bool) -> None:
    """This rank's log files."""
    where = f"log_{place().world}_rank_{place().rank}.jsonl"
    if watch.logs:
        write_log(watch.folder / f"megatron_debug_component_0_fwd_{where}", ours.records)
        if speaker:
            write_log(watch.folder / f"hf_debug_fwd_{where}", theirs.records)
    if watch.backward:
        write_log(watch.folder / f"debug_bwd_{where}", [*theirs.backward, *ours.backward])


def checks_of(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], dtype: str, judged: str, near: verdict.Measured
) -> Iterator[verdict.Check]:
    """The conditions of the verdict."""
    if judged == "float32":
        yield from verdict.wide_checks(near if dtype == judged else verdict.measure(theirs["float32"], ours["float32"]))
        return
    own = verdict.measure(theirs["float32"], theirs[dtype])
    yield from verdict.narrow_checks(dtype, near, own, verdict.measure(theirs["float32"], ours[dtype]))
