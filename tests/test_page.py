"""The tree and the page of `inspect`: alike layers and experts are one entry, nothing is lost, names stay names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch.distributed.checkpoint as dcp
import zoo
from command_line import EXAMPLE, succeed, transcode

import transcoder
from transcoder.inspection import look
from transcoder.outline import Held, outline, tree
from transcoder.page import page
from transcoder.spec import DTYPES

HOSTILE = (
    "<img src=x onerror=window.hit=1>.weight",
    "</script><script>window.hit=1</script>",
    "<!--<script>.weight",
    "a'\"&amp;`${1}.weight",
    "right\u202eto\u2066left.weight",
    "new\nline\x1b[31m\x00.weight",
    "\u2028.weight",
    "__proto__.constructor",
    "..",
    "",
)


def held(key: str, shape: tuple[int, ...] = (2, 3), file: str = "model.safetensors", offset: int = 0) -> Held:
    """A tensor in one piece."""
    return Held(key, DTYPES["bfloat16"], shape, ((tuple((0, size) for size in shape), file, offset),))


def report_of(tensors: list[Held], files: dict[str, int] | None = None) -> dict[str, Any]:
    """What a page needs of a report."""
    names = {file for each in tensors for _, file, _ in each.places}
    listed = [{"name": name, "bytes": size} for name, size in (files or dict.fromkeys(sorted(names), 1)).items()]
    counts = {"tensors": len(tensors), "parameters": sum(prod(each.shape) for each in tensors)}
    return {"source": "somewhere", "format": "safetensors", "warnings": [], "config": {}, "files": listed, **counts}


def data_of(text: str) -> dict[str, Any]:
    """The data that a page carries."""
    blocks = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(blocks) == 1
    found: dict[str, Any] = json.loads(blocks[0])
    return found


def _numbers(node: dict[str, Any], way: list[dict[str, Any]]) -> Iterator[tuple[list[str], dict[str, Any], int]]:
    here = [*way, node] if node["n"] or node.get("i") else way
    if "t" in node:
        choices = [each.get("i") or [each["n"]] for each in here]
        for index, parts in enumerate(product(*choices)):
            yield [str(part) for part in parts], node, index
    for inner in node.get("b", ()):
        yield from _numbers(inner, here)


def told(data: dict[str, Any]) -> Iterator[tuple[str, str, list[int], list[Any]]]:
    """Every tensor that the data tells: key, dtype, shape and places as box, file, offset."""
    for parts, leaf, index in _numbers(data["tree"], []):
        dtype, _, shape, edges, boxes = leaf["t"]
        flat = leaf["p"][index]
        found = boxes or [list(box) for box in product(*(map(list, pairwise(dim)) for dim in edges))]
        rows = [[box, data["files"][flat[2 * n]][0], flat[2 * n + 1]] for n, box in enumerate(found)]
        yield ".".join(parts), dtype, shape, rows


SOURCES = [
    "llama",
    "deepseek-v3",
    "nemotron-h",
    "qwen2.5-vl",
    "megatron",
    "megatron cut",
    "zarr",
    "zarr3",
    "plain",
    "adapter",
]


def _source(kind: str, place: Path) -> Path:
    if kind in zoo.KINDS:
        return zoo.made(kind)
    if kind == "plain":
        dcp.save(zoo.read(zoo.made("llama")), checkpoint_id=place / "dcp", no_dist=True)
        return place / "dcp"
    if kind == "adapter":
        return adapters.written(place / "a", adapters.updates(zoo.read(zoo.made("llama")), r".*[qv]_proj\.weight"))
    options: dict[str, Any] = {"tp": 2, "pp": 2, "ep": 2, "layout": "per-layer"} if kind == "megatron cut" else {}
    options |= {"format": kind} if kind.startswith("zarr") else {}
    transcoder.hf2mcore(zoo.made("qwen3-moe"), place / "m", **options)
    return place / "m"


@pytest.mark.parametrize("kind", SOURCES)
def test_the_page_tells_every_tensor_and_the_place_of_every_chunk(tmp_path: Path, kind: str) -> None:
    source = _source(kind, tmp_path)
    report = transcoder.inspect(source, html=tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    found = {key: (dtype, shape, places) for key, dtype, shape, places in told(data)}
    _, tensors = look(source)
    wanted = {
        each.key: (
            each.dtype.name,
            list(each.shape),
            [[list(map(list, box)), file, at] for box, file, at in each.places],
        )
        for each in tensors
    }
    assert found == wanted
    assert set(found) == {row["key"] for row in report["keys"]}
    assert (data["tensors"], data["format"]) == (report["tensors"], report["format"])


def test_alike_layers_and_experts_are_one_entry(tmp_path: Path) -> None:
    lines = transcoder.inspect(zoo.made("qwen3-moe"), as_tree=True)["tree"]
    text = "\n".join(lines)
    assert len(lines) < 25 and "0–2 (3 alike)" in text and "0–3 (4 alike)" in text
    assert re.search(r"gate_proj\.weight +bfloat16 \[72, 72\], .*12 tensors, 124,416 bytes", text)
    total = sum(int(line.split()[-2].replace(",", "")) for line in lines if not line.startswith(" "))
    assert total == sum(tensor.nbytes for tensor in zoo.read(zoo.made("qwen3-moe")).values())


def test_layers_that_differ_in_anything_stay_apart() -> None:
    tensors = [held(f"layers.{n}.weight", (2, 3) if n != 3 else (3, 2), offset=n) for n in range(6)]
    text = "\n".join(tree(outline(tensors)))
    assert "0–2 (3 alike)" in text and "4–5 (2 alike)" in text


def test_numbers_are_in_order_of_their_size() -> None:
    tensors = [held(f"layers.{n}.{name}", (n + 1, 2)) for n in (0, 2, 10) for name in ("b", "a")]
    found = [line.split()[0] for line in tree(outline(tensors)) if re.match(r"  \d", line)]
    assert found == ["0", "2", "10"]


def test_names_of_any_depth_and_length_have_a_place() -> None:
    names = ["a." * 100_000 + "b", "layers.007.w", "layers." + "9" * 5000, "layers.٣.w", "x" * 10_000]
    tensors = [held(name) for name in names]
    text = page(report_of(tensors), outline(tensors))
    assert len(text) < 100_000 and sum(1 for _ in told(data_of(text))) == 5
    assert "007" in json.dumps(data_of(text)) and not any("alike" in line for line in tree(outline(tensors)))


def test_hostile_names_stay_inside_the_data() -> None:
    tensors = [held(name, file="<b>&.safetensors") for name in HOSTILE]
    report = report_of(tensors) | {"source": "</title><script>window.hit=1</script>", "warnings": [HOSTILE[1]]}
    text = page(report | {"config": {HOSTILE[0]: HOSTILE[1]}}, outline(tensors))
    assert text.count("<script") == 2 == text.count("</script") and text.count("<!--") == 0 and "<img" not in text
    assert text.isascii() or not set(text) & set("\u202e\u2066\u2028\x1b\x00")
    assert data_of(text)["files"][0][0] == "<b>&.safetensors"
    assert not set("\u202e\u2066\u2028\x1b\x00\n") & set(json.dumps(data_of(text), ensure_ascii=False))
    lines = list(tree(outline(tensors)))
    assert not set("\u202e\u2066\u2028\x1b\x00\n") & set("".join(lines))


def test_chunks_that_are_no_grid_keep_their_boxes() -> None:
    boxes = (((0, 2), (0, 3)), ((0, 1), (3, 5)), ((1, 2), (3, 5)))
    odd = Held("w", DTYPES["float32"], (2, 5), tuple((box, f"f{n}", n) for n, box in enumerate(boxes)))
    data = data_of(page(report_of([odd]), outline([odd])))
    [(key, _, _, rows)] = list(told(data))
    assert (key, [row[0] for row in rows]) == ("w", [[list(pair) for pair in box] for box in boxes])


def test_the_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    done = succeed("inspect", EXAMPLE, "--html", tmp_path / "page.html")
    assert str(tmp_path / "page.html") in done.out
    report = succeed("inspect", EXAMPLE, "--html", tmp_path / "page.html", "--tree", "--json").report
    assert report["html"] == str(tmp_path / "page.html") and report["tree"]
    refused = transcode("inspect", EXAMPLE, "--html", tmp_path / "no" / "page.html")
    assert (refused.code, "No such file" in refused.err) == (4, True), refused.err
