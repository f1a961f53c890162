"""Structured Wanda."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffgym.plugins.bases import Criterion
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Wanda(Criterion):
    """|W| times the norm of the inputs: a weight matters as much as what flows through it.

    Element score S_ij = |W_ij| * ||x_j||_2 (Sun et al. 2023, arXiv 2306.11695, Eq. 1); a unit's score is the sum over
    the consumer columns it owns. The norm here is the root of the mean square, E[x_j^2]^(1/2), which differs from
    ||x_j||_2 by the square root of the token count: one factor for all channels, so the order is the same.
    """

    name = "wanda"
    needs = frozenset({"square"})

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score elements, shape (m, n)."""
        assert stats.square is not None, "needs square"
        return weight.abs() * stats.square.sqrt().to(weight.dtype)
