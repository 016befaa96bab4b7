"""The page of `inspect --html` in a real browser: clicked through, searched, hovered over, in both colours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_page
import zoo
from browser import Browser
from published import config_of
from test_page import HOSTILE, held, report_of

import transcoder
from transcoder.outline import Held, outline
from transcoder.page import page

pytestmark = pytest.mark.slow
LARGEST = 4_000_000  # bytes of the page of 671 billion parameters
HEADS = (
    "[...document.querySelectorAll('{0}')].filter(e => e.checkVisibility() && e.firstChild.textContent === '{1}')[0]"
)


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A browser that has nothing to complain of in the end, and asked for nothing but files."""
    with Browser() as made:
        yield made
        assert made.complaints() == []
        assert all(url.startswith(("file://", "about:")) for url in made.requests())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Megatron checkpoint and its page."""
    place = tmp_path_factory.mktemp("page")
    transcoder.hf2mcore(zoo.made("deepseek-v3"), place / "m", tp=2, pp=2, ep=2)
    transcoder.inspect(place / "m", html=place / "page.html")
    return place / "m", place / "page.html"


def _press(browser: Browser, name: str) -> None:
    """Open the first closed entry of a name."""
    head = HEADS.format("details:not([open])>summary", name)
    browser.wait(head)
    browser.point(head, click=True)


def test_clicking_down_leads_to_the_chunks(browser: Browser, checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    source, path = checkpoint
    browser.open(path)
    assert "DeepseekV3ForCausalLM" in browser.run("document.getElementById('facts').textContent")
    for name in ("decoder", "layers", "1–22 alike", "mlp", "experts", "experts", "linear_fc1", "weight"):
        _press(browser, name)
    browser.wait(
        "document.querySelector('.note') && document.querySelector('.note').textContent.includes('2 alike tensors')"
    )
    assert "chunk grid 8 × 2 × 1" in browser.run("document.querySelector('.note').textContent")
    browser.picture(tmp_path / "tree.png")
    row = next(
        r for r in transcoder.inspect(source)["keys"] if r["key"].endswith("1.mlp.experts.experts.linear_fc1.weight")
    )
    browser.run("document.getElementById('search').focus()")
    browser.type(row["key"])
    browser.wait("document.querySelectorAll('#found summary').length === 1")
    browser.point("document.querySelector('#found summary')", click=True)
    browser.wait("document.querySelector('#found table')")
    cells = browser.run(
        "[...document.querySelectorAll('#found tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(cells) == row["chunks"] and {line[1] for line in cells} == set(row["files"])
    assert all(line[0] == line[1][2:].split("_")[0] for line in cells)
    assert cells[0][3] == "0:1, 0:46, 0:72"


def test_one_by_one_shows_each_of_the_alike(browser: Browser, checkpoint: tuple[Path, Path]) -> None:
    browser.open(checkpoint[1])
    for name in ("decoder", "layers", "1–22 alike", "one by one"):
        _press(browser, name)
    _press(browser, "2")
    browser.wait("document.querySelectorAll('.each details[open] summary').length > 3")
    browser.point("document.querySelector('.each details[open] details summary')")
    browser.wait("!document.getElementById('tip').hidden")
    assert browser.run("document.querySelector('#tip b').textContent").startswith("decoder.layers.2.")


def test_hovering_tells_key_dtype_shape_grid_rank_file_and_offset(
    browser: Browser, checkpoint: tuple[Path, Path]
) -> None:
    browser.open(checkpoint[1])
    _press(browser, "embedding")
    _press(browser, "word_embeddings")
    browser.wait(HEADS.format("summary", "weight"))
    browser.point(HEADS.format("summary", "weight"))
    browser.wait("document.getElementById('tip').textContent.includes('embedding.word_embeddings.weight')")
    text = browser.run("document.getElementById('tip').innerText")
    for part in ("bfloat16 [256, 72]", "chunk grid 2 × 1", "rank 0, __0_", "rank 1, __1_", " at ", "0:128, 0:72"):
        assert part in text, text


def test_files_and_ranks_lead_to_their_tensors(browser: Browser, checkpoint: tuple[Path, Path]) -> None:
    browser.open(checkpoint[1])
    browser.point("document.querySelector('[data-tab=ranks]')", click=True)
    browser.wait("document.querySelectorAll('#ranks .row').length === 4")
    browser.point("document.querySelectorAll('#ranks .row')[3]", click=True)
    browser.wait("document.querySelectorAll('#found summary').length > 3")
    assert browser.run("document.getElementById('search').value") == "file:__3_"
    browser.point("document.querySelector('[data-tab=files]')", click=True)
    browser.wait("document.querySelectorAll('#files .row').length === 8")
    assert browser.run("document.getElementById('found').hidden")
    browser.point("document.querySelector('[data-tab=config]')", click=True)
    browser.wait("document.getElementById('config').innerText.includes('hidden_size')")


def test_colours_follow_the_system_and_the_button(browser: Browser, checkpoint: tuple[Path, Path]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(checkpoint[1])
    seen = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen.append(browser.run(colour))
        browser.point("document.getElementById('theme')", click=True)
        seen.append(browser.run(colour))
        browser.run("delete document.documentElement.dataset.theme")
    assert seen[0] == seen[3] == "rgb(255, 255, 255)" and seen[1] == seen[2] != seen[0]


def test_hostile_names_are_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    tensors = [held(name, file="<img src=x onerror=window.hit=1>") for name in HOSTILE]
    report = report_of(tensors) | {"source": HOSTILE[1], "warnings": [HOSTILE[0]], "config": {HOSTILE[0]: HOSTILE[1]}}
    (tmp_path / "page.html").write_text(page(report, outline(tensors)))
    browser.open(tmp_path / "page.html")
    browser.run("document.getElementById('search').focus()")
    browser.type("e")
    browser.wait("document.querySelectorAll('#found summary').length > 4")
    browser.point("document.querySelector('#found summary')")
    for tab in ("files", "ranks", "config", "tensors"):
        browser.point(f"document.querySelector('[data-tab={tab}]')", click=True)
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('img, b:not(#tip b)').length") == 0
    assert browser.run("window.hit === undefined && Object.prototype.hit === undefined")
    text = browser.run("document.getElementById('found').textContent")
    assert "<img src=x onerror=window.hit=1>.weight" in text and "\u202e" not in text


def test_671_billion_parameters_are_a_small_page_that_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    from hollow import write_sparse

    from transcoder.planning import plan_hf2mcore

    (tmp_path / "hf").mkdir()
    write_sparse(config_of("DeepSeek-V3"), tmp_path / "hf", [f"model-{n:05d}.safetensors" for n in range(1, 164)])
    plan = plan_hf2mcore(tmp_path / "hf", tp=8, pp=16, ep=32)
    stored = [
        Held(s.name, s.dtype, s.shape, tuple((c.box, c.file, c.offset) for c in s.chunks))
        for s in plan.placement.catalog.values()
    ]
    report = report_of(stored) | {"format": "torch_dist"}
    (tmp_path / "mcore.html").write_text(page(report, outline(stored)))
    transcoder.inspect(tmp_path / "hf", html=tmp_path / "hf.html")
    assert sum(len(each.places) for each in stored) > 48_000
    for name, query in (("mcore.html", "layers.60.mlp linear_fc2"), ("hf.html", "layers.60.mlp.experts.255.")):
        assert (tmp_path / name).stat().st_size < LARGEST
        started = time.monotonic()
        browser.open(tmp_path / name)
        assert browser.run("document.querySelectorAll('summary').length") < 100
        assert time.monotonic() - started < 10
        browser.run("document.getElementById('search').focus()")
        browser.type(query)
        browser.wait("document.querySelectorAll('#found summary').length > 1")
        browser.point("document.querySelector('[data-tab=files]')", click=True)
        browser.wait("document.querySelectorAll('#files .row').length === 100")


def test_ranks_by_their_files_are_ranks_too(browser: Browser, tmp_path: Path) -> None:
    files = [f"mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt" for t in range(2) for p in range(11)]
    tensors = [held(f"layers.{n}.weight", file=file) for n, file in enumerate(files)]
    (tmp_path / "page.html").write_text(page(report_of(tensors), outline(tensors)))
    browser.open(tmp_path / "page.html")
    browser.point("document.querySelector('[data-tab=ranks]')", click=True)
    browser.wait("document.querySelectorAll('#ranks .row').length === 22")
    assert browser.run("document.querySelectorAll('#ranks .row .name')[10].textContent") == "rank 0 10"
    browser.point("document.querySelectorAll('#ranks .row')[10]", click=True)
    browser.wait("document.querySelectorAll('#found summary').length === 1")
    assert browser.run("document.querySelector('#found summary').firstChild.textContent") == "layers.10.weight"


def test_the_adapters_page_opens_too(browser: Browser, tmp_path: Path) -> None:
    source = test_page._source("adapter", tmp_path)
    transcoder.inspect(source, html=tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    _press(browser, "base_model")
    browser.wait("document.querySelectorAll('summary').length > 1")
