"""Directories of torch.distributed.checkpoint that megatron-core's dist_checkpointing did not write.

    fsdp_dtensor   Megatron-FSDP: names of modules behind `model.module.`, gate and up apart (`weight_w`, `weight_v`),
                   experts numbered over all ranks (megatron/core/transformer/fsdp_dtensor_checkpoint.py, 0.16)
    torch_dcp      what trainers outside of Megatron save: Hugging Face names (NeMo Automodel, NeMo RL, verl), or those
                   of torchtitan

Both are recognised by their names alone, and become a store whose keys are those of a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from transcoder.errors import Problem, refuse
from transcoder.formats.localnames import stored_key
from transcoder.formats.torch_dist import TorchDist

TITAN = "tok_embeddings.weight"
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_FSDP = re.compile(r"(?:model\.)?(?:module\.)+((?:language_model\.)?(?:embedding|decoder|output_layer|mtp)\..+)")
_EMBEDDINGS = ("embed_tokens.weight", "backbone.embeddings.weight", "backbone.embedding.weight")
_EXPERTS = ".mlp.experts.experts."


class FsdpDtensor(TorchDist):
    """A checkpoint of Megatron-FSDP under the keys of `singleton_local_shards`."""

    form = "fsdp_dtensor"


class PlainDcp(TorchDist):
    """A checkpoint of another trainer."""

    form = "torch_dcp"


def recognised(store: TorchDist) -> TorchDist:
    """The store as what its names show it to be. Raises InputError for names of no known trainer."""
    names = {_WRAPPERS.sub("", key): key for key in store.tensors}
    if any(_FSDP.fullmatch(name) for name in names):
        return _made(FsdpDtensor, store, dict(_module_names(names)))
    if any(name.removeprefix("language_model.").startswith("decoder.") for name in names):
        return store
    plain = {_unwrapped(name, names): key for name, key in names.items()}
    if not any(name == TITAN or name.endswith(_EMBEDDINGS) for name in plain):
        return store
    return _made(PlainDcp, store, plain)


def _unwrapped(name: str, names: Mapping[str, str]) -> str:
    """A name without the key under which a trainer keeps its model."""
    inside = any(other.startswith(("model.model.", "model.lm_head.", f"model.{TITAN}")) for other in names)
    return name.removeprefix("model.") if inside else name


def _module_names(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Keys of a recipe, and the stored ones; what has no such name stays as it is and is refused later."""
    local = {name: found[1] if (found := _FSDP.fullmatch(name)) else name for name in names}
    others = {re.sub(r"_[wv]$", "", name) for name in local.values()}
    for name, inner in local.items():
        key, expert = stored_key(inner.replace(".mtp_model_layer.", ".transformer_layer."), others)
        yield key.replace(_EXPERTS, f"{_EXPERTS}{expert}.") if expert >= 0 else key, names[name]


def _made(kind: type[TorchDist], store: TorchDist, keys: Mapping[str, str]) -> TorchDist:
    if len(keys) != len(store.tensors):
        problem = Problem(found=f"{len(store.tensors)} tensors", expected=f"{len(keys)} names")
        raise refuse("names", "two tensors of the checkpoint are one tensor of the model", [problem])
    tensors = {key: store.tensors[stored] for key, stored in keys.items()}
    notes = tuple(text for text in store.warnings if "metadata.json" not in text)
    return kind(store.path, tensors, store.objects, store.ignored, store.common, notes)
