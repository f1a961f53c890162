"""A resource for ffgym: the energy of decoding one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ffgym

if TYPE_CHECKING:
    from ffgym.costs.resource import Setting

# Horowitz, "Computing's energy problem", ISSCC 2014: a 16-bit multiplication and addition, and a byte from DRAM.
# In tenths of a picojoule: whole numbers keep sums exact.
PER_MAC = 15
PER_BYTE = 1625
JOULES = 1e-13


class DecodeEnergy(ffgym.Resource):
    """Energy of decoding one token at batch size 1: arithmetic, weights read once, the KV cache of the context."""

    name = "decode-energy"
    quantity = "decoding energy"
    column = "mJ/token"
    key = "decode_energy"

    def unit_price(self, sublayer: ffgym.Sublayer, setting: Setting) -> float:
        """A unit's arithmetic, its weights, and the keys and values of its KV group."""
        macs = sublayer.unit_macs + 2 * sublayer.query_heads_per_unit * sublayer.head_dim * setting.context
        numbers = sublayer.unit_params + 2 * sublayer.head_dim * setting.context
        return PER_MAC * macs + PER_BYTE * numbers * setting.number_bytes

    def rest(self, model: Any, setting: Setting) -> float:
        """The output head; of the embeddings only one row is read."""
        head: int = model.get_output_embeddings().weight.numel()
        return head * (PER_MAC + PER_BYTE * setting.number_bytes)

    def text(self, cost: float) -> str:
        """In millijoules."""
        return f"{1e3 * JOULES * cost:.3g}"


@ffgym.hookimpl
def ffgym_resources() -> list[type[ffgym.Resource]]:
    """Offer the resource."""
    return [DecodeEnergy]
