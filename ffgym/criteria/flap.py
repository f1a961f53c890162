"""FLAP's fluctuation metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffgym.plugins.bases import Criterion
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Flap(Criterion):
    """Variance of a channel times its column's squared norm: what a bias cannot make up for goes last.

    Channel score S_j = Var[x_j] * ||W_:j||^2, the weighted input feature variance (WIFV) of FLAP (An et al. 2023, arXiv
    2312.11983): the output error that is left when channel j is replaced by its mean, E||W_:j (x_j - E[x_j])||^2. It
    fits ``prune.calibration = "affine"`` best, which puts that mean into the consumer's bias.
    """

    name = "flap"
    needs = frozenset({"mean", "square"})

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score channels, shape (n,)."""
        return stats.variance * weight.square().sum(dim=0)
