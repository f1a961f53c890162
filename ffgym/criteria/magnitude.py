"""Plain weight magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffgym.plugins.bases import Criterion
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Magnitude(Criterion):
    """|W|: the smallest weights go first.

    Element score S_ij = |W_ij| (Han et al. 2015, arXiv 1506.02626); a unit's score is the sum over the consumer columns
    it owns. Looks at no data.
    """

    name = "magnitude"

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score elements, shape (m, n)."""
        return weight.abs()
