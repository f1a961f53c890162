"""AlphaPruning: weights with a heavier-tailed spectrum keep more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field

from ffgym.heuristics.owl import spread
from ffgym.plugins.bases import Heuristic, PluginConfig
from ffgym.pruning.precision import in_float64
from ffgym.types import SublayerView

# Eigenvalues below this share of the largest are rounding, not spectrum.
SMALLEST_EIGENVALUE = 1e-12
TAIL = 0.5  # share of the eigenvalues that the exponent is fitted to


class Alpha(Heuristic):
    """Keep ratios fall linearly with the power-law exponent of each consumer's spectrum.

    Small exponents, heavy tails, mark well-trained weights (heavy-tailed self-regularisation; Lu et al. 2024, arXiv
    2410.10912). The exponent is the Hill estimate over the larger half of the eigenvalues of W W^T, as in
    the setting ``xmin_mid`` of the paper's code. The paper makes a layer's sparsity S times a factor in
    [1 - epsilon, 1 + epsilon]; ``span`` is S * epsilon, by default 0.2 * 0.3. It uses the mean over all linears of a
    decoder layer; here each sublayer has an exponent of its own, from its consumer. Looks at no data.
    """

    name = "alpha"

    class Config(PluginConfig):
        """Options of the table ``[prior]``."""

        span: float = Field(0.06, gt=0, le=0.5, description="keep ratios differ by at most twice this")

    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray:
        """Negated exponents, mapped linearly, shape (2L,)."""
        exponents = np.array([hill_exponent(eigenvalues(view.weight)) for view in sublayers])
        fitted = exponents[np.isfinite(exponents)]
        return spread(-np.minimum(exponents, fitted.max(initial=1.0)), self.config.span)


def eigenvalues(weight: torch.Tensor) -> np.ndarray:
    """Eigenvalues of W W^T that are not 0, ascending.

    Args:
        weight: W, shape (m, n), any floating dtype.

    Returns:
        shape (rank,), float64.
    """
    W = in_float64(weight)
    values = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W)
    return np.asarray(values[values > SMALLEST_EIGENVALUE * values[-1]].cpu())


def hill_exponent(values: np.ndarray) -> float:
    """Hill estimate of alpha for a density that falls like x^-alpha: 1 + k / sum_i ln(x_(n-i+1) / x_(n-k)).

    Args:
        values: x, positive, ascending, shape (n,); k is half of n, at least 1.

    Returns:
        alpha, > 1; infinite where the values do not differ, or fewer than 2 are given.
    """
    k = min(max(1, int(TAIL * len(values))), len(values) - 1)
    if k < 1:
        return np.inf
    excess = float(np.log(values[-k:] / values[-k - 1]).sum())
    return 1 + k / excess if excess > 0 else np.inf
