"""First-order Taylor expansion of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffgym.plugins.bases import Criterion
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Taylor(Criterion):
    """|W * dL/dW|: a weight matters as much as the loss would change, to first order, if it were zero.

    Element score S_ij = |W_ij * dL/dW_ij|, from the gradient of the mean token loss over the calibration text
    (Molchanov et al. 2019, arXiv 1906.10771, who square it); a unit's score is the sum over the consumer columns it
    owns. The absolute value is taken element by element before the sum, as in LLM-Pruner's ``param_first`` (Ma et al.
    2023, arXiv 2305.11627): in a trained model the signed changes nearly cancel within a channel.
    """

    name = "taylor"
    needs = frozenset({"gradient"})

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score elements, shape (m, n)."""
        assert stats.gradient is not None, "needs gradient"
        return (weight * stats.gradient).abs()
