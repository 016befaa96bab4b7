"""Open a Megatron checkpoint: which config, which dialect; and bind it to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from transcoder import manifest
from transcoder.atlas import Atlas
from transcoder.checks import check_coverage, check_mcore
from transcoder.dialects import dialect_of
from transcoder.disk import there
from transcoder.errors import Problem, refuse
from transcoder.foreign import spelled
from transcoder.formats.foreign import PlainDcp
from transcoder.formats.huggingface import HfDirectory, open_hf, side_files
from transcoder.formats.opening import open_store
from transcoder.formats.store import LeftOut, Store
from transcoder.hfconfig import architecture_of, normalise, read_config
from transcoder.iterations import find_iteration, notes
from transcoder.megatronconfig import check_agreement, config_from, stored_fields
from transcoder.original import Original, original_of
from transcoder.planner import HfTensor, Model, build_model
from transcoder.rankgrid import bound
from transcoder.recipe import Recipe
from transcoder.recipes import recipe_for
from transcoder.shapes import fields_of_keys, fields_of_shapes
from transcoder.sizing import axis_sizes, given_sizes
from transcoder.spec import DType
from transcoder.variants import export_variants, shown

PREDICTIONS = "mtp."  # layers that predict further tokens


@dataclass(frozen=True)
class Megatron:
    """An opened iteration bound to a recipe: every element proved to be there exactly once."""

    path: Path
    store: Store
    model: Model
    atlas: Atlas
    dtype: DType
    architecture: str  # the Hugging Face class
    reference: Path | None  # directory of config.json, tokenizer and the other side files
    config: dict[str, Any]  # that config.json, or what Megatron's own configuration implies
    original: HfDirectory | None  # the directory that the user gave, if it holds weights
    origin: Original  # what is known of the original's files
    originally: dict[str, str]  # which variants they were
    manifest: dict[str, Any] | None

    def stored(self, tensor: HfTensor) -> DType:
        """The dtype in which the checkpoint holds a Hugging Face tensor."""
        return self.store.tensors[tensor.key][0]

    @property
    def nbytes(self) -> int:
        """Payload bytes of all weights."""
        return sum(spec.nbytes for spec in self.store.catalog.values())

    @property
    def files(self) -> list[str]:
        """Names of the payload files."""
        return self.store.files

    @property
    def everything(self) -> list[str]:
        """Names of the files that a run reads tensors by."""
        return [*self.store.index, *self.files]


def open_megatron(
    path: Path,
    hf_model: Path | None = None,
    arch: str = "",
    expert_layout: str = "",
    quantised: bool = False,
    like: Mapping[str, tuple[int, ...]] | None = None,
    follow_links: bool = False,
) -> Megatron:
    """The checkpoint, its plan proved. Raises InputError for whatever does not fit.

    expert_layout, quantised: which Hugging Face files it is to be seen as; by default those of the original, decoded.
    follow_links: whether shards of `hf_model` may be links that lead out of it.
    like: names and shapes of the weights whose spelling counts instead of the original's.
    """
    folder = find_iteration(path)
    store = open_store(folder)
    table = manifest.read(folder)
    check_files(folder, table, hf_model is not None)
    reference = _reference(folder, hf_model)
    left_out = side_files(reference, set())[1] if reference == folder / "hf" else ()
    store = replace(store, warnings=(*notes(path), *store.warnings, *(row for row in left_out if "left out" in row)))
    _check_weights(store)
    config = read_config(reference) if reference else _implied_config(folder, store, arch)
    architecture = arch or architecture_of(config)
    recipe = spelled(recipe_for(architecture), store)
    store = _without_predictions(store, recipe)
    values = normalise(config, recipe.defaults)
    foreign = isinstance(store, PlainDcp)
    dialect = "singleton" if foreign else dialect_of(store.tensors)  # which leaves names as they are
    original = open_hf(hf_model, follow_links) if hf_model is not None and any(hf_model.glob("*.safetensors")) else None
    origin = original_of(original, table, config)
    shapes = like or ({key: shape for key, (_, shape, _) in store.tensors.items()} if foreign else origin.shapes)
    originally = shown(recipe.hf_variants, shapes, given_sizes(recipe, values)[0]) if shapes else {}
    wanted = {"experts": expert_layout} if expert_layout else {}
    values |= export_variants(recipe, store.tensors, dialect == "stacked", originally, wanted, quantised)
    sizes = axis_sizes(recipe, values, sum(prod(shape) for _, shape, _ in store.tensors.values()), _most_layers(store))
    sizes["pad"] = max(0, _embedding_rows(store) - sizes["vocab"])
    model = build_model(recipe, values, sizes, dialect)
    store = bound(store, model)
    check_mcore(model, store.catalog)
    atlas = Atlas(store.catalog)
    check_coverage(model, atlas)
    usual = one_dtype(model, store)
    return Megatron(
        folder, store, model, atlas, usual, architecture, reference, config, original, origin, originally, table
    )


def _check_weights(store: Store) -> None:
    """Refuse a checkpoint that holds training state alone, which is what is left of it without its model."""
    if not store.tensors and store.ignored:
        problems = [Problem(found=line) for line in store.left_out()]
        hint = "float32 masters and moments of an optimizer are not exported; save the checkpoint with its model"
        raise refuse("no-weights", f"the checkpoint holds no weights of a model: {hint}", problems)


def _without_predictions(store: Store, recipe: Recipe) -> Store:
    """The store without layers that predict further tokens, where the Hugging Face class has no place for them."""
    keys = [key for key in store.tensors if key.startswith(PREDICTIONS)]
    if not keys or any(side.name.startswith(PREDICTIONS) for rule in recipe.rules for side in rule.mcore):
        return store
    nbytes = sum(prod(shape) * dtype.size for dtype, shape, _ in map(store.tensors.__getitem__, keys))
    kept = {key: value for key, value in store.tensors.items() if key not in keys}
    left = LeftOut(len(keys), nbytes, f"layers for further tokens, unknown to recipe {recipe.name},")
    return replace(store, tensors=kept, ignored={**store.ignored, PREDICTIONS: left})


def _embedding_rows(store: Store) -> int:
    shapes = [s for key, (_, s, _) in store.tensors.items() if key.endswith("embedding.word_embeddings.weight") and s]
    return shapes[0][0] if len(shapes) == 1 else 0


def _most_layers(store: Store) -> int:
    return max([len(store.tensors), *(shape[0] for _, shape, _ in store.tensors.values() if shape)])


def check_files(folder: Path, table: dict[str, Any] | None, other_reference: bool) -> None:
    """Refuse files that are not those of the manifest, trackers apart; those under hf/ only matter when used."""
    unused = ("../", "hf/") if other_reference else ("../",)
    rows = [row for row in (table or {}).get("files", []) if not row["name"].startswith(unused)]
    problems = list(manifest.changed_files(folder, rows))
    if problems:
        raise refuse("changed", "files of the checkpoint are not those that were written", problems)


def _reference(folder: Path, hf_model: Path | None) -> Path | None:
    """The directory with config.json; None where there is none."""
    if hf_model is not None and not (hf_model / "config.json").is_file():
        raise refuse("no-config", f"{hf_model} holds no config.json", [Problem(file=str(hf_model))])
    if (folder / "hf").is_symlink():
        raise refuse("link", "the folder of the model's files is a link", [Problem(file="hf", found="a link")])
    for candidate in (hf_model, folder / "hf", folder.parent / "huggingface", folder.parent.parent / "huggingface"):
        if candidate is not None and there(candidate / "config.json"):
            return candidate
    return None


def _implied_config(folder: Path, store: Store, arch: str) -> dict[str, Any]:
    """config.json from Megatron's own configuration, for the class that the user names."""
    if isinstance(store, PlainDcp):
        message = "a plain directory of torch.distributed.checkpoint carries no config; give --hf-model DIR"
        raise refuse("no-config", message, [Problem(file=str(folder))])
    if not arch:
        hint = "give --hf-model DIR, or the Hugging Face class with --arch NAME"
        raise refuse("no-config", f"the checkpoint carries no Hugging Face config; {hint}", [Problem(file=str(folder))])
    dtypes = [dtype.name for dtype, _, _ in store.tensors.values()]
    recipe, shapes = recipe_for(arch), {key: shape for key, (_, shape, _) in store.tensors.items()}
    said, shown = stored_fields(folder, store.common), fields_of_shapes(recipe, shapes, dialect_of(shapes))
    check_agreement({"the files": said, "the stored tensors": shown})
    fields = {"padded_vocab_size": _embedding_rows(store)} | shown | fields_of_keys(shapes) | said
    return config_from(recipe, arch, fields, max(set(dtypes), key=dtypes.count))


def one_dtype(model: Model, store: Store) -> DType:
    """The dtype of all weights, but for those whose rule has another one, too. Raises InputError listing odd ones."""
    stored = {key: dtype for key, (dtype, _, _) in store.tensors.items()}
    common = [stored[key] for key, tensor in model.mcore.items() if not tensor.family.rule.dtype]
    usual = max(set(common), key=common.count)
    odd = [
        Problem(tensor=key, rule=t.family.rule.label, expected=t.family.dtype(usual).name, found=stored[key].name)
        for key, t in model.mcore.items()
        if not t.family.accepts(stored[key], usual)
    ]
    if odd:
        raise refuse("dtype", "tensors have other dtypes than they should", odd)
    return usual
