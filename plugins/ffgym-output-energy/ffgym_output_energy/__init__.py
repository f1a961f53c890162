"""A criterion for ffgym that shares a sublayer's output energy out among its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import ffgym

if TYPE_CHECKING:
    import torch


class OutputEnergy(ffgym.Criterion):
    """A channel's share of the output energy, with what it has in common with other channels.

    E||W x||^2 = sum_ij (W^T W)_ij G_ij with G = E[x x^T]. Channel j by itself has the term i = j. The terms i != j say
    what it adds to the others, or takes from them where they cancel out; a part of them, ``shared``, is given to j.
    """

    name = "output-energy"
    needs = frozenset({"second_moment"})

    class Config(ffgym.PluginConfig):
        """Options of the table ``[criterion]``."""

        shared: float = Field(default=0.5, ge=0, le=1, description="part of the common energy that counts, in [0, 1]")

    def score(self, weight: torch.Tensor, stats: ffgym.LayerStats) -> torch.Tensor:
        """Score channels: (m, n) -> (n,)."""
        moment = stats.second_moment
        assert moment is not None, "needs asks for it"
        own = weight.square().sum(dim=0) * moment.diagonal()
        common = ((weight @ moment) * weight).sum(dim=0) - own
        shared: float = self.config.shared
        return own + shared * common


@ffgym.hookimpl
def ffgym_criteria() -> list[type[ffgym.Criterion]]:
    """Offer the criterion."""
    return [OutputEnergy]
