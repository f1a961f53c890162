"""A resource for ffgym: the energy of decoding one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ffgym
from ffgym.costs.macs import Macs

if TYPE_CHECKING:
    from ffgym.costs.resource import CostSetting

# Horowitz, "Computing's energy problem", ISSCC 2014: a 16-bit multiplication and addition, and a byte from DRAM.
# In tenths of a picojoule: whole numbers keep sums exact.
PER_MAC = 15
PER_BYTE = 1625
JOULES = 1e-13


class DecodeEnergy(ffgym.Resource):
    """Energy of decoding one token at batch size 1: arithmetic, weights read once, the KV cache of the context.

    Of experts those count that the token is sent to, as many as before when others are gone: an expert costs its row of
    the router.
    """

    name = "decode-energy"
    quantity = "decoding energy"
    column = "mJ/token"

    def unit_price(self, sublayer: ffgym.Sublayer, setting: CostSetting) -> float:
        """A unit's arithmetic, its weights, and the keys and values that it caches."""
        weights = sublayer.unit_macs if sublayer.kind == "experts" else sublayer.unit_params
        cached = 2 * sublayer.kv_heads_per_unit * sublayer.head_dim * setting.context
        macs = Macs().unit_price(sublayer, setting)
        return PER_MAC * macs + PER_BYTE * (weights + cached) * setting.number_bytes

    def rest(self, model: Any, setting: CostSetting) -> float:
        """The output head and a token's experts; of the embeddings only one row is read."""
        return Macs().rest(model, setting) * (PER_MAC + PER_BYTE * setting.number_bytes)

    def text(self, cost: float) -> str:
        """In millijoules."""
        return f"{1e3 * JOULES * cost:.3g}"


@ffgym.hookimpl
def ffgym_resources() -> list[type[ffgym.Resource]]:
    """Offer the resource."""
    return [DecodeEnergy]
