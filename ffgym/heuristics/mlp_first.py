"""MLPs before attention, the ends of the model spared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from ffgym.plugins.bases import Heuristic, PluginConfig
from ffgym.types import SublayerView


class MlpFirst(Heuristic):
    """Cuts MLPs before attention, and spares those at both ends of the model.

    Attention has importance 1, an MLP -1, and the MLPs of the first ``spare_first`` and last ``spare_last`` layers have
    1 as well, so the budget is taken from the MLPs between them as long as these can pay for it. At most half of the
    MLPs are spared: in a shallow model both ends shrink by the same factor, rounded down.

    Source: the first and the last layers are the ones that structured pruners leave alone (LLM-Pruner, Ma et al. 2023,
    arXiv 2305.11627).
    """

    name = "mlp-first"

    class Config(PluginConfig):
        """Options of the table ``[prior]``."""

        spare_first: int = Field(3, ge=0, description="layers at the start whose MLPs are spared")
        spare_last: int = Field(1, ge=0, description="layers at the end whose MLPs are spared")

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """1 for what is spared, -1 for the rest, shape (2L,)."""
        depth = sublayers[0].sublayer.depth
        first, last = fitting_ends(self.config.spare_first, self.config.spare_last, depth)
        cut = [view.sublayer.kind != "attention" and first <= view.sublayer.layer < depth - last for view in sublayers]
        return np.where(cut, -1.0, 1.0)


def fitting_ends(first: int, last: int, depth: int) -> tuple[int, int]:
    """Shrink both ends by one factor until together they take at most half of ``depth`` layers."""
    room = depth // 2
    if first + last <= room:
        return first, last
    return first * room // (first + last), last * room // (first + last)
