"""Images in, text out: patches, positions, logits and tokens of Qwen2.5-VL are those of transformers."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generating import ask_transformers, command, launch, model_of, request_of, steps_of, tokens_of
from vision_models import SETTINGS, make_picture, make_vision_model

import transcoder
from transcoder import InputError, UsageError
from transcoder.runtime import images
from transcoder.runtime.device import shutdown
from transcoder.runtime.session import Conversation, Request
from transcoder.runtime.vision import Positions, rope_positions

IMAGE = 5  # the id of an image's token
QUESTION = "What is it?"


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    return make_vision_model(tmp_path_factory.mktemp("vision") / "hf")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two pictures of different shapes."""
    place = tmp_path_factory.mktemp("pictures")
    return str(make_picture(place / "wide.png", 41, 30)), str(make_picture(place / "tall.png", 30, 66))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The model in transformers, in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def processed(sources: tuple[str, ...], **settings: Any) -> Any:
    """Patches and grids as transformers makes them."""
    from transformers.image_utils import load_image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**settings)([load_image(each) for each in sources], return_tensors="pt")


def inputs_of(request: Request) -> dict[str, Any]:
    """What transformers needs beside the ids."""
    if not request.images:
        return {}
    kinds = torch.tensor([[int(each == IMAGE) for each in request.ids]])
    return {**processed(request.images, **SETTINGS), "mm_token_type_ids": kinds}


def placed(request: Request) -> Any:
    """Our positions of the prompt, [3, 1, tokens]."""
    return Positions(rope_positions(request.ids, request.grids, IMAGE, 2)).between(0, len(request.ids), "cpu")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize(("width", "height"), [(41, 30), (7, 5), (300, 31), (640, 480)])
def test_patches_are_those_of_transformers(width: int, height: int, mode: str, tmp_path: Path) -> None:
    picture = str(make_picture(tmp_path / "picture.png", width, height, mode))
    for settings, table in ((images.ImageSettings(), {}), (images.settings_of(SETTINGS), SETTINGS)):
        patches, grids = images.prepare((picture, picture), settings)
        want = processed((picture, picture), **table)
        assert [list(grid) for grid in grids] == want["image_grid_thw"].tolist()
        assert patches.dtype == np.float32 and patches.shape == want["pixel_values"].shape
        assert np.abs(patches - want["pixel_values"].numpy()).max() < 1e-6


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_logits_and_tokens_are_those_of_transformers(
    count: int, cached: bool, folder: Path, pictures: tuple[str, str], reference: Any
) -> None:
    request = request_of(folder, QUESTION, pictures[:count])
    inputs = inputs_of(request)
    with torch.no_grad():
        want = reference(torch.tensor([request.ids]), **inputs).logits
    steps = steps_of(model_of(folder), folder, request, 24, cached)
    assert (steps[0].output - want).abs().max() <= 1e-5 * want.std()
    assert tokens_of(steps) == ask_transformers(reference, request.ids, 24, **inputs)


@pytest.mark.parametrize("count", [1, 2])
def test_positions_are_those_of_transformers(
    count: int, folder: Path, pictures: tuple[str, str], reference: Any
) -> None:
    request = request_of(folder, QUESTION, pictures[:count])
    inputs = inputs_of(request)
    kinds, grids = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    want, delta = reference.model.get_rope_index(torch.tensor([request.ids]), kinds, grids)
    assert torch.equal(placed(request), want)
    ours = Positions(rope_positions(request.ids, request.grids, IMAGE, 2))
    length = len(request.ids)
    assert ours.between(length + 3, length + 4, "cpu").flatten().tolist() == [length + 3 + int(delta)] * 3


def test_an_image_token_that_the_model_writes_is_a_word(folder: Path, pictures: tuple[str, str]) -> None:
    from transcoder.hfconfig import read_config

    request, config, model = request_of(folder, QUESTION, pictures[:1]), read_config(folder), model_of(folder)
    for cached in (True, False):
        conversation = Conversation(model, config, request, len(request.ids) + 2, cached)
        conversation.logits()
        conversation.agree(IMAGE)
        after = conversation.logits()[0, -1]
        if cached:
            expected = after
        assert torch.allclose(after, expected, atol=1e-4)


def test_prompts_and_images_that_do_not_fit(folder: Path, pictures: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="1 images for 2 places"):
        request_of(folder, "<|image_pad|> and <|image_pad|>", pictures[:1])
    with pytest.raises(InputError, match="expected 0 for 0 images; found 1"):
        request_of(folder, "no <|image_pad|>")
    with pytest.raises(InputError, match="image tokens do not fit"):
        rope_positions([1, IMAGE, IMAGE, 2], [(1, 4, 4)], IMAGE, 2)
    in_place = request_of(folder, "a<|image_pad|>b<|image_pad|>", pictures)
    assert [each for each in in_place.ids if each != IMAGE] == list(request_of(folder, "ab").ids)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that writes no log."""

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server(pictures: tuple[str, str]) -> Iterator[str]:
    """Serves the folder of the pictures."""
    handler = functools.partial(Quiet, directory=str(Path(pictures[0]).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_url_and_a_file_give_the_same_text(
    folder: Path, pictures: tuple[str, str], server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for source in (pictures[0], f"{server}/wide.png"):
        status, out, err = command(
            capsys, "--hf_model_path", folder, "--image_path", source, "--prompt", QUESTION, "--max_new_tokens", 3
        )
        assert (status, err) == (0, "")
        assert (
            f"\nImage: {source}\nPrompt: {QUESTION}\nGenerated: <|im_start|>user\n<|vision_start|><|image_pad|>" in out
        )
        found.append(out.replace(source, ""))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "source", ["none.png", "words.png", "half.png", "thin.png", "{}/none.png", "http://127.0.0.1:9/x"]
)
def test_an_image_that_cannot_be_read_is_one_error(
    source: str, folder: Path, pictures: tuple[str, str], server: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(Path(pictures[1]).read_bytes()[:900])
    make_picture(tmp_path / "thin.png", 900, 3)
    path = source.format(server) if "/" in source else str(tmp_path / source)
    status, out, err = command(capsys, "--hf_model_path", folder, "--image_path", path, "--prompt", "p")
    assert (status, out) == (3, "")
    assert err.startswith("error: cannot read an image\n") and path in err and err.count("\n") == 2


def test_images_at_two_processes(folder: Path, pictures: tuple[str, str], tmp_path: Path) -> None:
    transcoder.hf2mcore(folder, tmp_path / "mcore", tp=2, sync=False)
    case = {"hf": str(folder), "prompt": QUESTION, "images": pictures, "limit": 24}
    weights = {"weights": str(tmp_path / "mcore")}
    cases = [{**case, "tp": 2}, {**case, **weights, "pp": 2}, {**case, **weights, "tp": 2, "images": ()}]
    found, _ = launch(cases, 2, tmp_path)
    model = model_of(folder)
    for result, asked in zip(found, cases, strict=True):
        want = steps_of(model, folder, request_of(folder, QUESTION, tuple(asked["images"])), 24)
        difference = (torch.tensor(result["logits"]) - want[0].output[0]).abs().max()
        assert difference <= (1e-4 if "tp" in asked else 0.0) * want[0].output.std()
        assert result["tokens"] == tokens_of(want)
