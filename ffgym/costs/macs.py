"""MACs: the arithmetic of one token."""

from __future__ import annotations

from typing import Any

from ffgym.costs.resource import CostSetting, Resource
from ffgym.types import Sublayer


class Macs(Resource):
    """Multiply-accumulates for one token that attends to ``context`` tokens.

    Linears, attention scores over all of the context, also where a window slides over it, and output head count; norms,
    activations and rotary embeddings do not. Of experts those count that a token is sent to, and the router.
    """

    name = "macs"
    quantity = "multiply-accumulates"
    column = "MACs/token"

    def unit_price(self, sublayer: Sublayer, setting: CostSetting) -> float:
        """The unit's linears, and the scores of its query heads."""
        scores = 2 * sublayer.query_heads_per_unit * sublayer.head_dim * setting.context
        return sublayer.unit_macs + scores

    def rest(self, model: Any, setting: CostSetting) -> float:
        """The head, a token's experts, and linears between: where OPT's embeddings are narrower than its layers."""
        from torch import nn

        from ffgym.models.families import family_of

        head, family = model.get_output_embeddings(), family_of(model)
        layers = family.layers(model)
        inside = {module for layer in layers for module in layer.modules()} | {head}
        between = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
        mixtures = filter(None, map(family.expert_modules, layers))
        experts = sum(
            router.top_k * parameter.numel() // owner.num_experts
            for owner, router in mixtures
            for parameter in owner.parameters()
            if parameter.ndim == 3  # a matrix for each expert; their biases have a dimension less
        )
        return float(head.weight.numel() + experts + sum(linear.weight.numel() for linear in between))
