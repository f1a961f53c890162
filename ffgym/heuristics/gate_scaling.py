"""Gate scaling: sublayers keep more if the loss depends more on their output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from ffgym.heuristics.owl import spread
from ffgym.plugins.bases import Heuristic
from ffgym.pruning.precision import in_float64
from ffgym.types import SublayerView

SPAN = 0.15  # keep ratios differ by at most twice this


class GateScaling(Heuristic):
    """Keep ratios rise with the rank of a sublayer's sensitivity to a gate on its output.

    Put a factor g = 1 on what the consumer writes, y = g W x. The loss changes with it by dL/dg = sum_ij W_ij dL/dW_ij
    (a bias is left out), and |dL/dg| says to first order what switching the sublayer off would cost. Sensitivities span
    decades, so their ranks are mapped, linearly, onto keep ratios within +-0.15; equal ones share a rank.

    FastForward Pruning (arXiv 2511.18977) compares with a baseline called GateScaling, whose definition was not at
    hand: this is our reading of it, and the 0.15 is our choice. Gates as sensitivities: Michel et al. 2019, arXiv
    1905.10650, who average absolute values over examples; here the average comes first.
    """

    name = "gate-scaling"
    needs = frozenset({"gradient"})

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """Ranks of the sensitivities, mapped linearly, shape (2L,)."""
        return spread(rankdata([gate_sensitivity(view) for view in sublayers]), SPAN)


def gate_sensitivity(view: SublayerView) -> float:
    """|dL/dg| of a factor g on the consumer's output, in nats per token."""
    assert view.stats.gradient is not None, "needs gradient"
    return abs(float((in_float64(view.weight) * in_float64(view.stats.gradient)).sum()))
