"""Parameters: what a model takes in memory and on disk."""

from __future__ import annotations

from typing import Any

from ffgym.costs.resource import CostSetting, Resource
from ffgym.types import Sublayer


class Params(Resource):
    """Parameters of the linears, their biases included; tied ones count once."""

    name = "params"
    quantity = "parameters"
    column = "params"

    def unit_price(self, sublayer: Sublayer, setting: CostSetting) -> float:
        """Producer rows, their biases and consumer columns."""
        return sublayer.unit_params

    def rest(self, model: Any, setting: CostSetting) -> float:
        """Embeddings, norms, output head, and biases that no unit owns."""
        from ffgym.models.families import family_of

        whole: int = sum(parameter.numel() for parameter in model.parameters())
        return whole - sum(sublayer.units * sublayer.unit_params for sublayer in family_of(model).sublayers(model))
