"""Keep the layers at both ends whole, cut the others alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffgym.heuristics.mlp_first import fitting_ends
from ffgym.plugins.bases import Heuristic
from ffgym.types import SublayerView

FIRST, LAST = 3, 1  # layers at the start and at the end that stay whole


class SkipEnds(Heuristic):
    """The first and last layers stay whole, all others are cut alike.

    Both sublayers of the first three layers and the last one have importance 1, all others -1, so the ends
    lose nothing as long as the middle can pay for the budget. At most half of the layers are spared: in a shallow model
    both ends shrink by the same factor, rounded down.

    Source: LLM-Pruner leaves the first and the last layers alone (Ma et al. 2023, arXiv 2305.11627).
    """

    name = "skip-ends"

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """1 for what is spared, -1 for the rest, shape (2L,)."""
        depth = sublayers[0].sublayer.depth
        first, last = fitting_ends(FIRST, LAST, depth)
        return np.array([-1.0 if first <= view.sublayer.layer < depth - last else 1.0 for view in sublayers])
