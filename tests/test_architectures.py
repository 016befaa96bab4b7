"""Every architecture from files that transformers writes: names, shapes, coverage, bytes there, and files back."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from naive import alike, decoded, expected, loaded, stacked
from zoo import ALL_KINDS, FP8_KINDS, KINDS, MXFP4_KINDS, Tensors, made, read, read_config, write

import transcoder
from transcoder.api import plan_hf2mcore
from transcoder.hfconfig import normalise
from transcoder.recipe import Field, Recipe, evaluate
from transcoder.recipes import registry

Grid = dict[str, int]


def assert_holds(found: Tensors, wanted: Tensors) -> None:
    """The same keys and values; rows beyond the vocabulary are zero."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        stored = found[key]
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            assert stored.shape[0] % 128 == 0 and not stored[len(tensor) :].any()
            stored = stored[: len(tensor)]
        assert stored.shape == tensor.shape, key
        assert stored.dtype in (tensor.dtype, torch.float32), key
        assert torch.equal(stored.float(), tensor.float()), key


def grids(kind: str) -> Iterator[Grid]:
    """One rank; everything cut in two; an uneven pipeline, the experts themselves cut."""
    sparse = any(".experts." in key for key in expected(kind))
    layers = read_config(made(kind)).get("num_hidden_layers", 3)
    yield {}
    yield {"tp": 2, "pp": 2, **({"ep": 2} if sparse else {})}
    yield {"tp": 2, "pp": min(3, layers), **({"etp": 2} if sparse else {})}


def class_of(kind: str) -> str:
    """The Hugging Face class of a kind."""
    return str(read_config(made(kind))["architectures"][0])


def test_every_architecture_has_a_kind_and_every_kind_a_recipe() -> None:
    assert {class_of(kind) for kind in ALL_KINDS} == set(registry())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_names_and_shapes_are_those_of_the_files(kind: str, proves: Callable[..., None]) -> None:
    proves("names", class_of(kind))
    plan = plan_hf2mcore(made(kind))
    found = {plan.source.weights.catalog[name].name: tensor.shape for name, tensor in plan.model.hf.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in read(made(kind)).items()}
    if kind in KINDS:
        assert found == shapes
    else:
        assert {part.name for codec in plan.source.weights.codecs.values() for part in codec.parts} <= shapes.keys()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_grid_holds_what_a_naive_reading_of_the_formats_gives(kind: str, tmp_path: Path) -> None:
    for number, grid in enumerate(grids(kind)):
        transcoder.hf2mcore(made(kind), tmp_path / str(number), layout="per-layer", sync=False, **grid)
        assert_holds(loaded(tmp_path / str(number)), expected(kind))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_layers_are_stacked_where_all_are_alike(kind: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(made(kind), tmp_path / "mcore", sync=False)
    assert_holds(loaded(tmp_path / "mcore"), stacked(expected(kind)) if alike(kind) else expected(kind))
    if not alike(kind):
        with pytest.raises(transcoder.UsageError):
            plan_hf2mcore(made(kind), layout="stacked")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_grid_and_dialect_gives_the_files_back(kind: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    proves("export", class_of(kind))
    source, quantised = made(kind), {} if kind in KINDS else {"quantize": "like-source"}
    layouts = ["per-layer", "singleton", *(["stacked"] if alike(kind) else [])]
    for number, grid in enumerate(grids(kind)):
        mcore, back = tmp_path / f"m{number}", tmp_path / f"h{number}"
        transcoder.hf2mcore(source, mcore, layout=layouts[number % len(layouts)], sync=False, **grid)
        transcoder.mcore2hf(mcore, back, sync=False, **quantised)
        assert {path.name for path in back.iterdir()} == {path.name for path in source.iterdir()}
        for path in source.iterdir():
            assert (back / path.name).read_bytes() == path.read_bytes(), f"{grid}: {path.name}"


@pytest.mark.parametrize("kind", [*FP8_KINDS, *MXFP4_KINDS])
def test_quantised_files_are_those_of_their_decoded_values(
    kind: str, tmp_path: Path, proves: Callable[..., None]
) -> None:
    proves("quantised", class_of(kind))
    config = {name: value for name, value in read_config(made(kind)).items() if name != "quantization_config"}
    plain = write(tmp_path / "plain", decoded(read(made(kind))), config)
    for number, grid in enumerate(grids(kind)):
        for name, source in (("a", made(kind)), ("b", plain)):
            transcoder.hf2mcore(source, tmp_path / f"{name}{number}", sync=False, **grid)
        one, two = loaded(tmp_path / f"a{number}"), loaded(tmp_path / f"b{number}")
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    transcoder.mcore2hf(tmp_path / "a0", tmp_path / "back", sync=False)
    found = read(tmp_path / "back")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in read(plain).items()
    }
    assert "quantization_config" not in read_config(tmp_path / "back")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_kinds_are_awkward(kind: str) -> None:
    tensors = read(made(kind))
    names = [name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and tensor.numel() <= 15360]
    assert all(len(tensors[name].flatten().float().unique()) == tensors[name].numel() for name in names)
    assert any(tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2] for tensor in tensors.values())
    assert len(list(made(kind).glob("*.safetensors"))) >= 2


def test_a_recipe_is_a_short_table() -> None:
    recipes = Path(transcoder.__file__).parent / "recipes"
    lines = {path.name: len(path.read_text().splitlines()) for path in recipes.glob("*.py")}
    found = {name for name in lines if "RECIPE = " in (recipes / name).read_text()}
    assert len(found) >= 20 and all(lines[name] <= 40 for name in found)


def expressions(recipe: Recipe) -> Iterator[str]:
    """Everything that a recipe may ask of a config."""
    yield from (*recipe.axes.values(), *recipe.kinds.values(), *recipe.model.values(), *recipe.runs.values())
    yield from (*recipe.checks, *recipe.outgoing)
    yield from (
        guard for guard in (*(rule.only for rule in recipe.rules), *(only for _, only in recipe.extra_state)) if guard
    )
    for text in recipe.model.values():
        yield from text.back.values() if isinstance(text, Field) else ()


@pytest.mark.parametrize(
    "recipe", {recipe.name: recipe for recipe in registry().values()}.values(), ids=lambda r: r.name
)
def test_every_branch_of_every_expression_is_understood(recipe: Recipe) -> None:
    found = 0
    for text in expressions(recipe):
        for node in ast.walk(ast.parse(text, mode="eval").body):
            if isinstance(node, ast.expr) and not isinstance(node, ast.Name | ast.Constant):
                with suppress(transcoder.InputError):  # understood: it only has no value without a config
                    evaluate(ast.unparse(node), {})
                found += 1
    assert found > 10


@pytest.mark.parametrize(
    "recipe", {recipe.name: recipe for recipe in registry().values()}.values(), ids=lambda r: r.name
)
def test_checks_ask_for_config_fields_alone(recipe: Recipe) -> None:
    names = {node.id for text in recipe.checks for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not names & {*recipe.axes, *recipe.kinds, "layers"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_silent_on_ties_means_what_transformers_means(kind: str) -> None:
    config = read_config(made(kind))
    del config["tie_word_embeddings"]
    model_type = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    expected = transformers.AutoConfig.for_model(model_type).tie_word_embeddings
    assert normalise(config, registry()[class_of(kind)].defaults)["tie_word_embeddings"] == expected
