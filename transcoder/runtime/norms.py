"""Norms that round once, behind their weight, which may be stored less one; over a head or over all of them."""

from __future__ import annotations

from typing import Any

from transcoder.runtime.layers import HFNorm, WideKeyNorm, WideQueryNorm


class LateNorm(HFNorm):
    """RMSNorm whose weight multiplies in float32, as in Gemma, OLMo 2 and GPT-OSS."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(config, hidden_size, eps, **options)
        self.less = float(config.layernorm_zero_centered_gamma)

    def weighted(self, wide: Any, weight: Any, dtype: Any) -> Any:
        """The product, rounded."""
        return (wide * (self.less + weight.float() if self.less else weight.float())).to(dtype)


class LateHeadNorm(LateNorm):
    """The same of queries or keys, whose type is float32 where that is what they are rotated in."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(config, hidden_size, eps, **options)
        self.wide = config.wide_rotation

    def weighted(self, wide: Any, weight: Any, dtype: Any) -> Any:
        """The product, rounded to the model's type."""
        out = super().weighted(wide, weight, dtype)
        return out.float() if self.wide else out


class LateQueryNorm(LateHeadNorm, WideQueryNorm):
    """The same over all query heads."""


class LateKeyNorm(LateHeadNorm, WideKeyNorm):
    """The same over all key heads."""


def norm_of(config: Any) -> Any:
    """The class of a model's norms."""
    return LateNorm if config.late_rounding or config.layernorm_zero_centered_gamma else HFNorm


def head_norms_of(config: Any) -> tuple[Any, Any]:
    """The classes of a model's norms of queries and of keys."""
    norm = norm_of(config)
    if not config.wide_qk_norm:
        return (LateHeadNorm, LateHeadNorm) if norm is LateNorm else (norm, norm)
    return (LateQueryNorm, LateKeyNorm) if norm is LateNorm else (WideQueryNorm, WideKeyNorm)
