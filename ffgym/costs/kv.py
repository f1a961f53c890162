"""KV: the cache that a token leaves behind."""

from __future__ import annotations

from ffgym.costs.resource import CostSetting, Resource
from ffgym.types import Sublayer


class KV(Resource):
    """Bytes that one token adds to the KV cache, in the model's dtype. MLPs cost nothing."""

    name = "kv"
    quantity = "KV-cache bytes"
    unit = "B"
    column = "KV/token"

    def unit_price(self, sublayer: Sublayer, setting: CostSetting) -> float:
        """Its key and value heads."""
        return 2 * sublayer.kv_heads_per_unit * sublayer.head_dim * setting.number_bytes
