"""Recipes of checkpoints that hold Hugging Face tensors under names of their own: the rules with that side on the left.

torchtitan's Llama has the names and the rotary order of Meta's files; everything else is as Hugging Face has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transcoder.errors import Problem, refuse
from transcoder.formats.foreign import TITAN, PlainDcp
from transcoder.formats.store import Store
from transcoder.layout import parse
from transcoder.recipe import Recipe, Rule, Side

HEAD = "lm_head.weight"
_TITAN_NAMES = {
    "model.embed_tokens.weight": TITAN,
    "model.norm.weight": "norm.weight",
    HEAD: "output.weight",
    "model.layers.{l}.input_layernorm.weight": "layers.{l}.attention_norm.weight",
    "model.layers.{l}.post_attention_layernorm.weight": "layers.{l}.ffn_norm.weight",
    "model.layers.{l}.self_attn.q_proj.weight": "layers.{l}.attention.wq.weight",
    "model.layers.{l}.self_attn.k_proj.weight": "layers.{l}.attention.wk.weight",
    "model.layers.{l}.self_attn.v_proj.weight": "layers.{l}.attention.wv.weight",
    "model.layers.{l}.self_attn.o_proj.weight": "layers.{l}.attention.wo.weight",
    "model.layers.{l}.mlp.gate_proj.weight": "layers.{l}.feed_forward.w1.weight",
    "model.layers.{l}.mlp.up_proj.weight": "layers.{l}.feed_forward.w3.weight",
    "model.layers.{l}.mlp.down_proj.weight": "layers.{l}.feed_forward.w2.weight",
}
_ROTARY = {"(g q d) h": ("(g q half two) h", "(g q two half) h"), "(g k) h": ("(g half two) h", "(g two half) h")}
_TURNED = ("q_proj.weight", "k_proj.weight")


def spelled(recipe: Recipe, store: Store) -> Recipe:
    """The recipe whose left side are the names of the store. Raises InputError for torchtitan's other models."""
    if not isinstance(store, PlainDcp):
        return recipe
    titan = TITAN in store.tensors
    if titan and recipe.name != "llama":
        hint = "load it in torchtitan and save it with last_save_in_hf"
        problem = Problem(tensor=TITAN, expected="LlamaForCausalLM", found=recipe.name, hint=hint)
        raise refuse("names", "only torchtitan's Llama is known by its own names", [problem])
    rules = tuple(_titan(recipe) if titan else _same(recipe))
    shown = {name: {next(iter(of)): ""} for name, of in recipe.mcore_variants.items() if name not in recipe.hf_variants}
    axes = {**recipe.axes, "two": "2", "half": "d // 2"} if titan else recipe.axes
    return replace(recipe, rules=rules, axes=axes, mcore_variants=shown)


def _same(recipe: Recipe) -> Iterator[Rule]:
    """Every Hugging Face tensor on both sides."""
    for rule in recipe.rules:
        for side in rule.hf:
            yield replace(rule, mcore=(side,), hf=(side,), plus=0, alias=False)


def _titan(recipe: Recipe) -> Iterator[Rule]:
    for rule in _same(recipe):
        (side,) = rule.hf
        if side.name not in _TITAN_NAMES:
            continue
        theirs, ours = side.layout, side.layout
        if side.name.endswith(_TURNED):
            theirs, ours = map(parse, _ROTARY[side.layout.text])
        yield replace(rule, mcore=(Side(_TITAN_NAMES[side.name], theirs),), hf=(Side(side.name, ours),))
