"""The mean of the last iterates: steadier than the last one, which holds the noise of single steps.

Source: Polyak and Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tail_mean(iterates: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Mean of the last ``share`` of the iterates, in [0, 1], always of at least the last one; of their shape."""
    return np.asarray(np.mean(iterates[-max(1, round(share * len(iterates))) :], axis=0))
