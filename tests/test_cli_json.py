"""Every command prints exactly one JSON object with --json, whatever happens, and the shipped schema describes it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import EXAMPLE, Result, flip, transcode

import transcoder

SCHEMA = json.loads((files("transcoder") / "schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ALWAYS = ["status", "command", "source", "destination", "architecture", "tensors", "parameters"]
ALWAYS += ["bytes_read", "bytes_written", "seconds", "peak_memory", "warnings"]
PARAMETERS = 1_000_576
Words = list[Any]


@dataclass(frozen=True)
class Place:
    """Checkpoints to point commands at."""

    root: Path  # nothing below it is to be changed but `new`
    new: Path  # does not exist

    @property
    def mcore(self) -> Path:
        """A Megatron checkpoint."""
        return self.root / "mcore"

    def broken(self, name: str) -> Path:
        """A changed copy."""
        return self.root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Megatron checkpoint and damaged ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    transcoder.hf2mcore(EXAMPLE, root / "mcore", tp=2)
    for name in ("flipped", "shorter"):
        shutil.copytree(root / "mcore", root / name, symlinks=True)
    for path in ("flipped", "shorter"):
        _damage(root / path / "iter_0000000", path)
    shutil.copytree(EXAMPLE, root / "other")
    flip(root / "other" / "model-00002-of-00003.safetensors", -1)
    shutil.copytree(EXAMPLE, root / "cut")
    shard = root / "cut" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    return root


def _damage(iteration: Path, how: str) -> None:
    if how == "shorter":
        (iteration / "__1_0.distcp").unlink()
        return
    chunk = transcoder.open_checkpoint(iteration)["output_layer.weight"].chunks[0]
    flip(iteration / chunk.file, chunk.offset)


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Place:
    """The checkpoints, and a destination of this test's own."""
    return Place(root, tmp_path / "new")


GOOD: dict[str, Callable[[Place], Words]] = {
    "hf2mcore": lambda p: ["hf2mcore", EXAMPLE, p.new, "--tp", 2, "--pp", 2, "--verify"],
    "hf2mcore dry": lambda p: ["hf2mcore", EXAMPLE, p.new, "--dry-run"],
    "mcore2hf": lambda p: ["mcore2hf", p.mcore, p.new, "--verify"],
    "mcore2hf dry": lambda p: ["mcore2hf", p.mcore, p.new, "--dry-run"],
    "import": lambda p: ["import", "--hf-model", EXAMPLE, "--megatron-path", p.new],
    "import dry": lambda p: ["import", "--hf-model", EXAMPLE, "--megatron-path", p.new, "--dry-run"],
    "export": lambda p: ["export", "--hf-model", EXAMPLE, "--megatron-path", p.mcore, "--hf-path", p.new],
    "export dry": lambda p: ["export", "--megatron-path", p.mcore, "--hf-path", p.new, "--dry-run"],
    "roundtrip": lambda p: ["roundtrip", EXAMPLE],
    "roundtrip written": lambda p: ["roundtrip", EXAMPLE, p.new, "--tp", 2],
    "roundtrip through files": lambda p: ["roundtrip", EXAMPLE, "--megatron-load-path", p.mcore],
    "verify": lambda p: ["verify", EXAMPLE, p.mcore],
    "check megatron": lambda p: ["check", p.mcore],
    "check quick": lambda p: ["check", p.mcore, "--quick"],
    "check hf": lambda p: ["check", EXAMPLE],
    "plan import": lambda p: ["plan", EXAMPLE, "--tp", 4],
    "plan export": lambda p: ["plan", p.mcore],
    "inspect megatron": lambda p: ["inspect", p.mcore],
    "inspect hf": lambda p: ["inspect", EXAMPLE, "--tree"],
    "inspect page": lambda p: ["inspect", p.mcore, "--html", p.new],
}
BAD: dict[str, tuple[int, str, Callable[[Place], Words]]] = {
    "no argument": (2, "usage", lambda p: ["hf2mcore"]),
    "too many arguments": (2, "usage", lambda p: ["verify", "a", "b", "c"]),
    "unknown option": (2, "usage", lambda p: ["check", p.mcore, "--fast"]),
    "option without value": (2, "usage", lambda p: ["plan", EXAMPLE, "--tp"]),
    "not a number": (2, "usage", lambda p: ["plan", EXAMPLE, "--tp", "two"]),
    "not a choice": (2, "usage", lambda p: ["hf2mcore", EXAMPLE, p.new, "--dtype", "int8"]),
    "out of range": (2, "usage", lambda p: ["check", p.mcore, "--sample", "101"]),
    "missing option": (2, "usage", lambda p: ["import", "--hf-model", EXAMPLE]),
    "export without a target": (2, "usage", lambda p: ["export", "--megatron-path", p.mcore]),
    "roundtrip of nothing": (2, "usage", lambda p: ["roundtrip"]),
    "inspect of nothing": (2, "usage", lambda p: ["inspect"]),
    "architectures of something": (2, "usage", lambda p: ["architectures", "all"]),
    "grid": (2, "mesh", lambda p: ["hf2mcore", EXAMPLE, p.new, "--tp", 3]),
    "plan grid": (2, "mesh", lambda p: ["plan", EXAMPLE, "--pp", 5]),
    "roundtrip grid": (2, "mesh", lambda p: ["roundtrip", EXAMPLE, "--ep", 2]),
    "inside": (2, "destination", lambda p: ["mcore2hf", p.mcore, p.mcore / "hf"]),
    "no source": (3, "not-found", lambda p: ["hf2mcore", p.new, p.new.parent / "b"]),
    "no megatron source": (3, "not-found", lambda p: ["mcore2hf", p.new, p.new.parent / "b"]),
    "verify nothing": (3, "not-found", lambda p: ["verify", EXAMPLE, p.new]),
    "check nothing": (3, "not-found", lambda p: ["check", p.new]),
    "inspect no source": (3, "not-found", lambda p: ["inspect", p.new]),
    "plan no source": (3, "not-found", lambda p: ["plan", p.new]),
    "no checkpoint": (3, "no-checkpoint", lambda p: ["check", p.new.parent]),
    "damaged source": (3, "checksum", lambda p: ["mcore2hf", p.broken("flipped"), p.new]),
    "damaged side": (3, "checksum", lambda p: ["verify", EXAMPLE, p.broken("flipped")]),
    "destination exists": (4, "destination", lambda p: ["hf2mcore", EXAMPLE, p.mcore]),
    "export exists": (4, "destination", lambda p: ["export", "--megatron-path", p.mcore, "--hf-path", EXAMPLE]),
    "difference": (5, "difference", lambda p: ["verify", p.mcore, p.broken("other")]),
    "roundtrip difference": (
        5,
        "difference",
        lambda p: ["roundtrip", p.broken("other"), "--megatron-load-path", p.mcore],
    ),
    "damage": (5, "damage", lambda p: ["check", p.broken("flipped")]),
    "missing payload": (5, "file", lambda p: ["check", p.broken("shorter"), "--quick"]),
    "truncated shard": (5, "safetensors", lambda p: ["check", p.broken("cut")]),
}


def _problems(report: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in VALIDATOR.iter_errors(report)]


def _checked(done: Result, command: str) -> dict[str, Any]:
    report = done.report
    assert done.out.count("\n") == 1
    assert _problems(report) == []
    assert [name for name in ALWAYS if name not in report] == []
    assert report["command"] == command
    return report


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("case", GOOD)
def test_success_is_one_object_that_fits_the_schema(place: Place, case: str) -> None:
    done = transcode(*GOOD[case](place), "--json")
    report = _checked(done, case.split()[0])
    assert (done.code, report["status"]) == (0, "ok"), done.err


@pytest.mark.parametrize("case", BAD)
def test_failure_is_one_object_that_fits_the_schema(place: Place, case: str) -> None:
    code, kind, words = BAD[case]
    line = words(place)
    done = transcode(*line, "--json")
    report = _checked(done, line[0])
    assert (done.code, report["status"]) == (code, "error"), done.err
    assert (report["error"]["code"], report["error"]["kind"]) == (code, kind)
    assert done.err.startswith("error: ")
    assert report["error"]["message"].split("\n")[0] in done.err


@pytest.mark.parametrize("line", [["--json"], ["nothing", "--json"]])
def test_without_a_command_the_object_names_the_program(line: list[str]) -> None:
    done = transcode(*line)
    assert _checked(done, "transcode")["error"]["kind"] == "usage"
    assert done.code == 2


def test_an_internal_error_fits_the_schema_too(place: Place) -> None:
    driver = "import transcoder.reading as reading\nreading.inspect = lambda path: 1 // 0"
    done = transcode("inspect", EXAMPLE, "--json", driver=driver)
    report = _checked(done, "inspect")
    assert (done.code, report["error"]["code"], report["error"]["kind"]) == (1, 1, "internal")


def test_quiet_and_debugging_leave_stdout_to_the_object(place: Place) -> None:
    done = transcode("check", place.new, "--json", "--quiet", "--log-level", "debug")
    assert _checked(done, "check")["error"]["code"] == 3
    assert "Traceback" in done.err


def test_conversions_report_what_they_moved(place: Place) -> None:
    done = transcode("hf2mcore", EXAMPLE, place.new, "--tp", 2, "--json").report
    written = sum(path.stat().st_size for path in place.new.rglob("*.distcp"))
    assert (done["tensors"], done["parameters"], done["bytes_read"]) == (39, PARAMETERS, 2 * PARAMETERS)
    assert done["bytes_written"] == written
    assert (done["source"], done["destination"]) == (str(EXAMPLE), str(place.new))
    assert (done["architecture"], done["folder"]) == ("LlamaForCausalLM", "iter_0000000")
    assert 0 < done["seconds"] < 60
    assert 10_000_000 < done["peak_memory"] < 1 << 30
    assert [row["parameters"] for row in done["rank_parameters"]] == [(PARAMETERS - 9 * 128) // 2 + 9 * 128] * 2


def test_exports_report_what_they_moved(place: Place) -> None:
    done = transcode("mcore2hf", place.mcore, place.new, "--json").report
    assert (done["tensors"], done["parameters"], done["bytes_written"]) == (39, PARAMETERS, 2 * PARAMETERS)
    assert done["destination"] == str(place.new)


def test_check_says_how_much_it_read(place: Place) -> None:
    whole = transcode("check", place.mcore, "--json").report
    assert whole["bytes_read"] == whole["checked"]["bytes"] == 2 * PARAMETERS
    assert whole["checked"]["checksums"] == sum(
        len(spec.chunks) for spec in transcoder.open_checkpoint(place.mcore).values()
    )
    quick = transcode("check", place.mcore, "--quick", "--json").report
    assert (quick["bytes_read"], quick["checked"]["checksums"]) == (0, 0)


def test_problems_name_the_file_and_the_tensor(place: Place) -> None:
    (row,) = transcode("check", place.broken("flipped"), "--json").report["error"]["problems"]
    assert row["tensor"] == "output_layer.weight"
    assert row["file"].endswith(".distcp")
    assert row["expected"].startswith("CRC-32 ")
    assert row["found"]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field less": lambda table: table.pop("seconds"),
    "another command": lambda table: table.update(command="convert"),
    "another status": lambda table: table.update(status="fine"),
    "a text for a count": lambda table: table.update(tensors="39"),
    "a negative count": lambda table: table.update(parameters=-1),
    "a fraction of a byte": lambda table: table.update(bytes_read=0.5),
    "warnings that are no list": lambda table: table.update(warnings="none"),
    "an error beside ok": lambda table: table.update(error={"code": 2, "kind": "a", "message": "b", "problems": []}),
    "an error that is not told": lambda table: table.update(status="error"),
    "no plan": lambda table: table.pop("plan"),
    "a file without size": lambda table: table["plan"]["files"][0].pop("bytes"),
    "a rule without codec": lambda table: table["plan"]["rules"][0].pop("codec"),
    "an unknown field of a rule": lambda table: table["plan"]["rules"][0].update(colour="red"),
    "cuts that are no numbers": lambda table: table["plan"]["rules"][0].update(cuts=["2"]),
    "another folder": lambda table: table.update(folder="/tmp/iter"),
    "another direction": lambda table: table.update(direction="both"),
}


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    """A report that fits the schema."""
    report = transcode("plan", EXAMPLE, "--json").report
    assert _problems(report) == []
    return report


@pytest.mark.parametrize("change", CHANGES)
def test_the_schema_refuses_another_shape(planned: dict[str, Any], change: str) -> None:
    changed = copy.deepcopy(planned)
    CHANGES[change](changed)
    assert _problems(changed) != []
