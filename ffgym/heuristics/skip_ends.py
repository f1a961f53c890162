"""Keep the layers at both ends whole, cut the others alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ffgym.heuristics.mlp_first import fitting_ends
from ffgym.plugins.bases import Heuristic, PluginConfig
from ffgym.types import SublayerView


class SkipEnds(Heuristic):
    """The first and last layers stay whole, all others are cut alike.

    Both sublayers of the first ``first`` and the last ``last`` layers have importance 1, all others -1, so the ends
    lose nothing as long as the middle can pay for the budget. At most half of the layers are spared: in a shallow model
    both ends shrink by the same factor, rounded down.

    Source: LLM-Pruner leaves the first and the last layers alone (Ma et al. 2023, arXiv 2305.11627).
    """

    name = "skip-ends"

    class Config(PluginConfig):
        """Options of the table ``[prior]``."""

        first: int = Field(3, ge=0, description="layers at the start that stay whole")
        last: int = Field(1, ge=0, description="layers at the end that stay whole")

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """1 for what is spared, -1 for the rest, shape (2L,)."""
        depth = sublayers[0].sublayer.depth
        first, last = fitting_ends(self.config.first, self.config.last, depth)
        return np.array([-1.0 if first <= view.sublayer.layer < depth - last else 1.0 for view in sublayers])
