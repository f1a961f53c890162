"""OWL: sublayers with more outliers keep more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffgym.plugins.bases import Heuristic
from ffgym.pruning.precision import in_float64
from ffgym.types import SublayerView

THRESHOLD = 5.0  # an outlier is this many times the mean; the paper's M
SPAN = 0.08  # keep ratios differ by at most twice this; the paper's lambda


class Owl(Heuristic):
    """Keep ratios rise linearly with the share of outliers among |W_ij| * ||x_j||.

    A sublayer's outlier ratio is the share of the consumer's elements |W_ij| * E[x_j^2]^(1/2) above M = 5 times their
    mean; keep ratios then spread over +-lambda = 0.08 around the uniform one (Yin et al. 2023, arXiv 2310.05175).
    OWL pools all linears of a decoder layer; here attention and MLP are separate decisions, so each sublayer has a
    ratio of its own, taken from its consumer.
    """

    name = "owl"
    needs = frozenset({"square"})

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """Outlier ratios, mapped linearly, shape (2L,)."""
        return spread([outlier_ratio(view, THRESHOLD) for view in sublayers], SPAN)


def outlier_ratio(view: SublayerView, threshold: float) -> float:
    """Share of the elements |W_ij| * E[x_j^2]^(1/2) that exceed ``threshold`` times their mean, in [0, 1]."""
    assert view.stats.square is not None, "needs square"
    scores = view.weight.float().abs() * view.stats.square.float().sqrt()
    return float(in_float64(scores > threshold * scores.mean()).mean())


def spread(values: Sequence[float] | np.ndarray, span: float) -> np.ndarray:
    """Map values linearly onto importances whose keep ratios lie within +-``span`` of their middle.

    The middle itself does not matter: the budget shifts all keep ratios alike.

    Args:
        values: finite, shape (2L,), the largest keeps most.
        span: half the difference between the largest and the smallest keep ratio, in (0, 0.5].

    Returns:
        shape (2L,), in [-2 span, 2 span]; all 0 where the values are equal.
    """
    values = np.asarray(values, dtype=np.float64)
    width = np.ptp(values)
    if width == 0:
        return np.zeros_like(values)
    return np.asarray(2 * span * (2 * (values - values.min()) / width - 1))
