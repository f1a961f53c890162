"""FLAP's global cut: units of all sublayers compete with their standardised scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffgym.heuristics.reference import ReferenceConfig, reference_sparsity
from ffgym.plugins.bases import Heuristic
from ffgym.pruning.precision import in_float64
from ffgym.types import SublayerView


class Flap(Heuristic):
    """Standardise the fluctuation scores within each sublayer, then cut all units of the model at one threshold.

    A channel's score is Var[x_j] * ||W_:j||^2 (WIFV). It is standardised over the channels of its sublayer, a unit's
    z-score is the mean over its channels, and the threshold is where the units above it cost (1 - ``reference``) of all
    prunable parameters (FLAP, An et al. 2023, arXiv 2312.11983, structure AL-AM). What each sublayer keeps above the
    threshold is its keep ratio r, and its importance 2 r - 1.

    ``reference`` is the target where it is left out, which is FLAP's own allocation; with another one all keep ratios
    of that cut are shifted alike to the target. FLAP's code also squares the scores of attention before it
    standardises them: not done here.
    """

    name = "flap"
    needs = frozenset({"mean", "square"})
    Config = ReferenceConfig

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """Keep ratios of the global cut, mapped from [0, 1] to [-1, 1], shape (2L,)."""
        scores = [standardised_units(view) for view in sublayers]
        costs = [view.sublayer.unit_params for view in sublayers]
        return 2 * keep_ratios(scores, costs, 1 - reference_sparsity(self)) - 1


def standardised_units(view: SublayerView) -> np.ndarray:
    """Z-scores of the units' fluctuation, shape (units,); 0 everywhere where all channels fluctuate alike."""
    fluctuation = in_float64(view.stats.variance * view.weight.float().square().sum(dim=0))
    spread = fluctuation.std(correction=0)
    z = (fluctuation - fluctuation.mean()) / spread if spread > 0 else fluctuation * 0
    return z.reshape(view.sublayer.units, -1).mean(dim=1).cpu().numpy()


def keep_ratios(scores: Sequence[np.ndarray], costs: Sequence[float], share: float) -> np.ndarray:
    """Share of each sublayer's units among the best of all units that together cost ``share`` of everything.

    Args:
        scores: per sublayer, scores that can be compared across sublayers, shape (units,).
        costs: per sublayer, what one unit costs.
        share: of the total cost that may be kept, in (0, 1).

    Returns:
        shape (sublayers,), in [0, 1].
    """
    units = [len(score) for score in scores]
    owner = np.repeat(np.arange(len(units)), units)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    spent = np.cumsum(np.repeat(np.asarray(costs, dtype=np.float64), units)[order])
    kept = owner[order][spent <= share * spent[-1] * (1 + 1e-12)]
    return np.asarray(np.bincount(kept, minlength=len(units)) / np.array(units))
