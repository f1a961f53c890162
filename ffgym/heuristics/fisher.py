"""Fisher: cut where the loss is estimated, to second order and after calibration, to rise least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffgym.heuristics.reference import ReferenceConfig, reference_sparsity
from ffgym.plugins.bases import Heuristic
from ffgym.types import SublayerView


class Fisher(Heuristic):
    """Minimise the summed second-order loss estimates of all sublayers, after calibration, at a sparsity.

    Each sublayer's path says what level k costs in nats per token, 1/2 tr(F Cov[error_k]): F is the Fisher information
    of the consumer's output, error_k what the refit leaves. Sublayers are taken as independent (K-FAC, arXiv
    1503.05671; the allocation by marginal costs is the optimality condition of a separable budget).
    """

    name = "fisher"
    needs = frozenset({"output_gradient"})
    Config = ReferenceConfig

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """Keep ratios of the solution, mapped from [0, 1] to [-1, 1]."""
        losses, costs = [], []
        for view in sublayers:
            assert view.loss_increase is not None, "asked for in needs"
            losses.append(view.loss_increase)
            costs.append(np.arange(view.sublayer.units + 1) * float(view.sublayer.unit_params))
        target = (1 - reference_sparsity(self)) * sum(cost[-1] for cost in costs)
        levels = cheapest_levels(losses, costs, target)
        return np.array([2 * k / view.sublayer.units - 1 for k, view in zip(levels, sublayers, strict=True)])


def cheapest_levels(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], target: float) -> list[int]:
    """Levels that minimise the summed loss within a cost, by bisection on the price of cost (Lagrange multiplier).

    Args:
        losses: per sublayer, loss at each level, shape (levels,).
        costs: per sublayer, cost at each level, shape (levels,), increasing.
        target: what all may cost together; at least the sum of the first levels.

    Returns:
        one level per sublayer; optimal among allocations of their own cost.
    """
    unit = max(float(cost[-1]) for cost in costs)

    def choose(log_price: float) -> list[int]:
        price = np.exp(log_price) / unit
        return [int(np.argmin(loss + price * cost)) for loss, cost in zip(losses, costs, strict=True)]

    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(float(cost[k]) for k, cost in zip(choose(middle), costs, strict=True))
        low, high = (middle, high) if total > target else (low, middle)
    return choose(high)
