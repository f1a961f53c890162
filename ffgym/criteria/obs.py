"""Optimal brain surgeon, as SparseGPT uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ffgym.errors import CalibrationError
from ffgym.plugins.bases import Criterion, PluginConfig
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Obs(Criterion):
    """Output error that removing a channel leaves once all other channels have been refitted.

    Channel score S_j = ||W_:j||^2 / [A^-1]_jj with A = G + ridge * scale(G) * I and G = E[x x^T]: SparseGPT's element
    score W_ij^2 / [H^-1]_jj (Frantar and Alistarh 2023, arXiv 2301.00774; Hassibi and Stork 1993), summed over the
    outputs, which all share one H. Up to the ridge it is exact for one channel. The channels of a KV group are added
    up, as if each went alone, so the group's own error is underestimated where they resemble one another.
    """

    name = "obs"
    needs = frozenset({"second_moment"})

    class Config(PluginConfig):
        """Options of the table ``[criterion]``."""

        ridge: float = Field(0.01, gt=0, description="damping, relative to the mean of G's diagonal (SparseGPT: 0.01)")

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score channels, shape (n,), float64.

        Raises:
            CalibrationError: the damped second moment cannot be factorised.
        """
        from ffgym.pruning.calibration import cholesky_
        from ffgym.pruning.factors import inverse_
        from ffgym.pruning.precision import in_float64

        assert stats.second_moment is not None, "needs second_moment"
        try:
            D = inverse_(cholesky_(in_float64(stats.second_moment).clone(), self.config.ridge))
        except CalibrationError as error:
            raise CalibrationError(f"criterion 'obs': {error.message}", hint="Raise criterion.ridge.") from error
        inverse_diagonal = D.square().sum(dim=0)  # A = C C^T and D = C^-1, so A^-1 = D^T D
        return in_float64(weight).square().sum(dim=0) / inverse_diagonal
