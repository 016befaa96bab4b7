"""Names that write to a terminal, that look like others, or that would be paths."""

from __future__ import annotations

import json
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import FC1, draft
from attacks.indexes import move
from attacks.model import read_file, write_file
from attacks.safetensors_files import NORM

ESCAPES = {
    "clear_screen": "\x1b[2J\x1b[H",
    "window_title": "\x1b]0;owned\x07",
    "hyperlink": "\x1b]8;;http://evil.example\x1b\\click",
    "eight_bit_escape": "\x9b31m",
    "carriage_return": "fine\rerror",
    "newline": "fine\nerror: all is well",
    "nul": "a\0b",
    "backspaces": "abc\x08\x08\x08xyz",
    "right_to_left": "\u202egnp.exe",
    "isolate": "\u2066\u2067abc",
    "line_separator": "a\u2028b",
    "next_line": "a\x85b",
    "zero_width": "a\u200bb\ufeffc",
    "cyrillic": "model.layers.0.\u0456nput_layernorm.weight",
    "combining": "e" + "\u0301" * 500,
    "path": "../../outside/secret.txt",
    "absolute_path": "/etc/passwd",
    "percent": "%s%n%d{0}{x.__class__}",
    "markup": "<script>alert(1)</script>",
    "emoji": "\U0001f4a9" * 300,
    "very_long": "long." * 3000,
    "rich_markup": "[bold red]x[/]",
    "tag_characters": "a\U000e0041\U000e0042",
    "delete": "a\x7fb",
}


def _enter() -> None:
    for word, text in ESCAPES.items():

        def tensor(bench: Bench, text: str = text) -> None:
            header, data = read_file(bench.first)
            header[text] = header.pop(NORM)
            write_file(bench.first, header, data)
            path = bench.source / "model.safetensors.index.json"
            rows = json.loads(path.read_text())
            rows["weight_map"][text] = rows["weight_map"].pop(NORM)
            path.write_text(json.dumps(rows))

        def key(bench: Bench, text: str = text) -> None:
            plan = draft()
            plan.entries[text] = plan.entries.pop(FC1)
            bench.rewrite(plan)

        for build, base, commands in ((tensor, "hf", "hf2mcore verify"), (key, "mcore", "mcore2hf plan")):
            build.__name__ = f"{word}_in_a_{build.__name__}"
            build.__doc__ = f"A name with {word.replace('_', ' ')}."
            attack("reject", base, commands, "")(build)


_enter()


def shown(needle: str = "") -> Any:
    """Commands that print what they find, whatever it is called."""
    return attack("reject", "hf", "hf2mcore check inspect", needle)


@shown("index")
def escape_in_a_file_name(bench: Bench) -> None:
    """An index that names a file which paints the terminal, and which is not there."""
    move(bench, "\x1b[2Jerror: none.safetensors")


@attack("ok", "hf", "", "", "inspect {src}", "inspect {src} --tree", "inspect {src} --json")
def inspect_shows_escaped_names(bench: Bench) -> None:
    """`inspect` prints the name of a tensor that no model has, escaped."""
    header, data = read_file(bench.first)
    header["\x1b[2J\u202e\x9b"] = header.pop(NORM)
    write_file(bench.first, header, data)
    path = bench.source / "model.safetensors.index.json"
    rows = json.loads(path.read_text())
    rows["weight_map"]["\x1b[2J\u202e\x9b"] = rows["weight_map"].pop(NORM)
    path.write_text(json.dumps(rows))


@attack("ok", "mcore", "", "", "inspect {src}", "inspect {src} --tree", "check {src} --quick")
def inspect_shows_escaped_keys(bench: Bench) -> None:
    """The same for a Megatron key."""
    plan = draft()
    plan.entries["\x1b[2J\u202e\x9b"] = plan.entries.pop(FC1)
    bench.rewrite(plan)


@attack("reject", "hf", "hf2mcore", "")
def escape_in_a_dtype(bench: Bench) -> None:
    """A dtype that paints the terminal."""
    header, data = read_file(bench.first)
    header[NORM]["dtype"] = "\x1b[31mBF16\u202e"
    write_file(bench.first, header, data)


@attack("ok", "hf", "inspect check")
def inspect_shows_an_escaped_architecture(bench: Bench) -> None:
    """The same for a class name."""
    bench.config(architectures=["\x1b[2J\u202eFor\x9bCausalLM"], note="\x1b[31m")


@attack("reject", "hf", "hf2mcore plan", "")
def escape_in_the_architecture(bench: Bench) -> None:
    """A class name that paints the terminal."""
    bench.config(architectures=["\x1b[2J\u202eFor\x9bCausalLM"], model_type="\x1b]0;x\x07")


@attack("warn", "hf", "hf2mcore plan", "quant")
def escape_in_the_quantisation(bench: Bench) -> None:
    """A method that paints the terminal."""
    bench.config(quantization_config={"quant_method": "\x1b[2J\u202e"})


@attack("warn", "hf", "hf2mcore", "")
def escape_in_a_side_file(bench: Bench) -> None:
    """A side file whose name paints the terminal, and which is worth a warning."""
    (bench.source / "\x1b[2J\u202emodeling.py").write_text("pass\n")


@attack("warn", "hf", "hf2mcore", "")
def side_file_name_that_is_not_utf8(bench: Bench) -> None:
    """A side file whose name is no text."""
    name = b"\xff\xfe.py".decode("utf-8", "surrogateescape")
    (bench.source / name).write_text("pass\n")


@attack("reject", "mcore", "mcore2hf check inspect", "")
def escape_in_a_tracker(bench: Bench) -> None:
    """A tracker that paints the terminal."""
    (bench.source / "latest_checkpointed_iteration.txt").write_bytes(b"\x1b[2J\xc2\x9b31m")


@attack("reject", "mcore", "mcore2hf check inspect", "")
def escape_in_a_backend(bench: Bench) -> None:
    """A backend that paints the terminal."""
    (bench.folder / "metadata.json").write_text(json.dumps({"sharded_backend": "\x1b[2J\u202e\x9b"}))


@attack("reject", "mcore", "mcore2hf check", "")
def escape_in_a_relative_path(bench: Bench) -> None:
    """A file name in the plan that paints the terminal."""
    plan = draft()
    plan.lay()
    plan.entries[FC1].chunks[0].path = "\x1b[2J\u202e\x9b.distcp"
    bench.rewrite(plan)


@attack("reject", "hf", "hf2mcore", "more|20")
def a_thousand_strangers(bench: Bench) -> None:
    """At most twenty lines of one kind of problem, then a count."""
    header, data = read_file(bench.first)
    for number in range(1000):
        header[f"stranger.{number}"] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    write_file(bench.first, header, data)
    path = bench.source / "model.safetensors.index.json"
    rows = json.loads(path.read_text())
    rows["weight_map"] |= {f"stranger.{number}": bench.first.name for number in range(1000)}
    path.write_text(json.dumps(rows))
