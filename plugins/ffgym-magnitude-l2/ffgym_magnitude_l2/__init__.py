"""A criterion for ffgym: the L2 norm of each channel's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import ffgym

if TYPE_CHECKING:
    import torch


class MagnitudeL2(ffgym.Criterion):
    """L2 norm of a channel's weights: channels with little weight go first.

    Channel score S_j = ||W_:j||_2 ^ exponent. A unit's score is the sum over the channels it owns, so with exponent 2
    it is the squared Frobenius norm of the unit's block.
    """

    name = "magnitude-l2"

    class Config(ffgym.PluginConfig):
        """Options of the table ``[criterion]``."""

        exponent: float = Field(default=1.0, gt=0, description="power of each channel's norm, above 0")

    def score(self, weight: torch.Tensor, stats: ffgym.LayerStats) -> torch.Tensor:
        """Score channels: (m, n) -> (n,)."""
        return weight.norm(dim=0) ** self.config.exponent


@ffgym.hookimpl
def ffgym_criteria() -> list[type[ffgym.Criterion]]:
    """Offer the criterion."""
    return [MagnitudeL2]
