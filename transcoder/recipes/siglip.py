"""The SigLIP tower and the projector of Gemma 3, under Hugging Face's own names, as Megatron Bridge keeps them.

Hugging Face files wrap the tower once more or not, under an old or a new prefix; so does Megatron Bridge, by the
release of transformers that it runs with.
"""

from __future__ import annotations

from transcoder.recipe import Rule, moved, rule

L = "encoder.layers.{b}."
TOWER = (
    "embeddings.patch_embedding.weight vh vc vp vq",
    "embeddings.patch_embedding.bias vh",
    "embeddings.position_embedding.weight vn vh",
    *(f"{L}layer_norm{n}.{part} vh" for n in (1, 2) for part in ("weight", "bias")),
    *(f"{L}self_attn.{name}_proj.weight vo vh" for name in ("q", "k", "v", "out")),
    *(f"{L}self_attn.{name}_proj.bias vo" for name in ("q", "k", "v", "out")),
    f"{L}mlp.fc1.weight vf vh",
    f"{L}mlp.fc1.bias vf",
    f"{L}mlp.fc2.weight vh vf",
    f"{L}mlp.fc2.bias vh",
    "post_layernorm.weight vh",
    "post_layernorm.bias vh",
)
VISION = tuple(rule(f"vision_tower.{text}", f"vision_tower.{text}") for text in TOWER)
M = "multi_modal_projector."
PROJECTOR = (
    rule(f"{M}mm_soft_embed_norm.weight vh", f"{M}mm_soft_emb_norm.weight vh"),
    rule(f"{M}proj.weight h/tp vh", f"{M}mm_input_projection_weight vh h"),
)
FLAT, WRAPPED = "vision_tower.", "vision_tower.vision_model."
HF_TOWERS = {"wrapped": WRAPPED, "flat": FLAT, "new-wrapped": f"model.{WRAPPED}", "new-flat": f"model.{FLAT}"}
MCORE_TOWERS = {"bridge-flat": FLAT, "bridge-wrapped": WRAPPED}  # Megatron Bridge with transformers 5 and 4
MARK = "embeddings.patch_embedding.weight"

AXES = {
    "b": "vision_num_hidden_layers or 12",
    "vh": "vision_hidden_size or 768",
    "vo": "vh",
    "vf": "vision_intermediate_size or 3072",
    "vc": "vision_num_channels or 3",
    "vp": "vision_patch_size or 16",
    "vq": "vp",
    "vn": "((vision_image_size or 224) // vp) * ((vision_image_size or 224) // vp)",
}
STATE = ((f"{M}mm_soft_embed_norm", ""), (f"{M}proj", ""))


def towers() -> tuple[Rule, ...]:
    """The tower's rules for each pair of forms."""
    return tuple(
        each
        for stored, mcore in MCORE_TOWERS.items()
        for found, hf in HF_TOWERS.items()
        for each in moved(VISION, f"tower == '{found}' and bridge == '{stored}'", (FLAT, mcore), (FLAT, hf))
    )


HF_VARIANTS = {"tower": {name: start + MARK for name, start in HF_TOWERS.items()}}
MCORE_VARIANTS = {"bridge": {name: start + MARK for name, start in MCORE_TOWERS.items()}}
