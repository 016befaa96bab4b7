"""Multi-latent attention as megatron-core has it, with the norms and the angles of Hugging Face.

The layer is megatron-core's own (megatron/core/transformer/multi_latent_attention.py), made of linear layers without
Transformer Engine: the down-projections are cut over ranks and their outputs gathered. Its keys have another width
than its values, and both are cached for every head, rotated.
"""

from __future__ import annotations

from typing import Any

from transcoder.runtime.layers import HFNorm

EPSILON = 1e-6  # of the norms of latents in transformers and in DeepSeek's own code, whatever rms_norm_eps is


class LatentNorm(HFNorm):
    """The norm of a compressed query or of compressed keys and values."""

    def __init__(self, config: Any, hidden_size: int, **_kwargs: Any) -> None:
        super().__init__(config, hidden_size, EPSILON)


class SharedAngles:
    """The model's rotary embedding in the place of a layer's own, of which it is no part."""

    def __init__(self, rotary: Any, factor: float | None) -> None:
        self._rotary, self._factor = rotary, factor

    def get_rotary_seq_len(self, *positional: Any, **named: Any) -> Any:
        """The number of positions, which those that were set make unimportant."""
        return self._rotary.get_rotary_seq_len(*positional, **named)

    def __call__(self, length: int, **_kwargs: Any) -> Any:
        """Angles; with the factor on their cosines and sines where megatron-core expects one."""
        angles = self._rotary(length)
        return angles if self._factor is None else (angles, self._factor)


def share_angles(model: Any, factor: float) -> None:
    """Let every layer of a stage turn positions into angles as the model does; factor: on cosines and sines."""
    given = factor if model.config.rope_type == "yarn" else None
    for layer in model.decoder.layers:
        del layer.self_attention.rotary_pos_emb  # a module of its own
        layer.self_attention.rotary_pos_emb = SharedAngles(model.rotary_pos_emb, given)
