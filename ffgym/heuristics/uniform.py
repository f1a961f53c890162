"""The same share everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffgym.plugins.bases import Heuristic
from ffgym.types import SublayerView


class Uniform(Heuristic):
    """Every sublayer keeps the same share, up to whole units: the baseline of every pruning paper."""

    name = "uniform"

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """All zeros, shape (2L,)."""
        return np.zeros(len(sublayers))
