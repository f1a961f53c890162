"""Optimal brain surgeon: backward elimination of units, with a refit after each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ffgym.errors import CalibrationError
from ffgym.plugins.bases import Criterion, PluginConfig
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Obs(Criterion):
    """Optimal brain surgeon: units go one after another, each time those that the others can make up for best.

    A unit's score is the output error once it is gone with all that went before it and what is left has been refitted:
    backward elimination by the error tr(W_S [P_SS]^-1 W_S^T) that a unit's channels S add, with P = A^-1 of what is
    left, A = G + ridge * scale(G) * I and G = E[x x^T]. For single weights that is W_ij^2 / [A^-1]_jj, by which
    SparseGPT chooses (Frantar and Alistarh 2023, arXiv 2301.00774); for heads and neurons ZipLM (Kurtic et al. 2023,
    arXiv 2302.04089) removes them so. The scores of a KV group's channels are equal, and sum up to the group's.
    """

    name = "obs"
    edition = 2  # units go one after another, and a KV group as a whole
    needs = frozenset({"second_moment"})

    class Config(PluginConfig):
        """Options of the table ``[criterion]``."""

        ridge: float = Field(0.001, gt=0, description="damping, relative to the mean of G's diagonal")

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score channels, shape (n,), float64.

        Raises:
            CalibrationError: the damped second moment cannot be factorised.
        """
        from ffgym.pruning.elimination import elimination_errors_
        from ffgym.pruning.precision import copy_in_float64

        assert stats.second_moment is not None, "needs second_moment"
        block = stats.channels_per_unit
        errors = elimination_errors_(copy_in_float64(weight), self._inverse(stats.second_moment), block)
        return errors.repeat_interleave(block) / block

    def _inverse(self, moment: torch.Tensor) -> torch.Tensor:
        """Of the damped moment, shape (n, n), float64."""
        import torch

        from ffgym.pruning.calibration import cholesky_
        from ffgym.pruning.precision import copy_in_float64

        try:
            lower = cholesky_(copy_in_float64(moment), self.config.ridge)
        except CalibrationError as error:
            raise CalibrationError(f"criterion 'obs': {error.message}", hint="Raise criterion.ridge.") from error
        return torch.cholesky_inverse(lower, out=lower)
