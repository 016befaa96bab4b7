"""The router of DeepSeek's manner: logits in float32, and groups of experts that count by their best ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from transcoder.runtime.layers import HFRouter

BEST = {"sigmoid": 2, "softmax": 1}  # experts whose scores make that of their group, in DeepSeek V3 and in V2


def limited(scores: Any, groups: int, kept: int, best: int) -> Any:
    """Scores [tokens, experts] with minus infinity outside of the best groups.

    >>> limited(torch.tensor([[0.1, 0.4, 0.3, 0.3]]), groups=2, kept=1, best=2).tolist()[0][:2]
    [-inf, -inf]
    """
    grouped = scores.unflatten(1, (groups, -1))
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    hidden = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, chosen, False)
    return grouped.masked_fill(hidden[..., None], float("-inf")).flatten(1)


class WideRouter(HFRouter):
    """The router whose logits are computed in float32.

    megatron-core ranks a group by the sum of as many experts as are chosen from each; where that is another number
    than transformers has, the choice is made here.
    """

    def gating(self, input: Any) -> Any:
        """Logits of the experts."""
        return functional.linear(input.float(), self.weight.float())

    def routing(self, logits: Any, *rest: Any, **options: Any) -> Any:
        """Probabilities and choice, [tokens, experts] each."""
        kept, best = self.config.moe_router_group_topk, BEST[self.score_function]
        if not kept or self.topk // kept == best:
            return super().routing(logits, *rest, **options)
        return self._chosen(logits.reshape(-1, self.config.num_moe_experts), kept, best)

    def _chosen(self, logits: Any, kept: int, best: int) -> tuple[Any, Any]:
        sigmoid = self.score_function == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        ranks = scores if self.expert_bias is None else scores + self.expert_bias
        chosen = limited(ranks, self.config.moe_router_num_groups, kept, best).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        if sigmoid:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * (self.config.moe_router_topk_scaling_factor or 1.0)
        empty = torch.zeros_like(logits)
        return empty.scatter(1, chosen, weights), empty.bool().scatter(1, chosen, True)
