"""Refit the consumer after units went: nested ridge for every level from one factorisation (docs/mathematics.md).

The problem, for a consumer W (m x n) whose channels stand in path order, inputs x with second moment G = E[x x^T], the
first k channels kept (K) and the rest dropped (P), l = lambda * mean(diag G):

    W'_K = argmin E||W x - W' x_K||^2 + l ||W' - W_K||^2 = W_K + W_P G_PK (A_KK)^-1,   A = G + l I

With A = C C^T (C lower), B = W C and D = C^-1 (lower) that is, for every k at once,

    W'_K = B[:, :k] D[:k, :k] = W_K - B[:, k:] D[k:, :k]

and ||B[:, k:]||^2, the squared norm of the columns that are left out, is the value of the minimum plus l ||W_P||^2: the
same objective with W' padded by zeros, so that the penalty counts the dropped weights too.
The affine form does the same on centred inputs and moves what the means carry into the bias,
b' = b + W mu - W'_K mu_K = b + B[:, k:] (D mu)[k:] (its case W' = W_K is the bias compensation of FLAP, arXiv
2312.11983).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ffgym.errors import CalibrationError
from ffgym.pruning.precision import in_float64
from ffgym.pruning.statistics import OVERFLOW_HINT

RIDGE_GRID = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT_LEVELS = (0.9, 0.75, 0.5)


class ConsumerPath(ABC):
    """A consumer's weights at every level: keep the first ``channels`` columns."""

    @abstractmethod
    def weight_at(self, channels: int) -> torch.Tensor:
        """The consumer's weight for the kept channels, shape (m, channels), float32."""

    @abstractmethod
    def bias_at(self, channels: int) -> torch.Tensor | None:
        """The consumer's bias at that level, shape (m,), float32; ``None`` where it has none."""

    def slopes(self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None) -> torch.Tensor:
        """What the loss changes by, to first order, as each channel joins those before it: <dL/dW, W_(k+1) - W_k>.

        Args:
            weight_gradient: dL/dW of the consumer at full width, shape (m, n), float32.
            bias_gradient: dL/db, shape (m,), float32; ``None`` where it has no bias.

        Returns:
            shape (n,), float32; negative where the channel helps.
        """
        losses = []
        for channels in range(weight_gradient.shape[1] + 1):
            loss = (self.weight_at(channels).float() * weight_gradient[:, :channels]).sum()
            bias = self.bias_at(channels)
            losses.append(loss if bias is None or bias_gradient is None else loss + bias.float() @ bias_gradient)
        return torch.stack(losses).diff()


class PlainPath(ConsumerPath):
    """Plain removal: the kept columns as they are.

    Args:
        weight: shape (m, n), path order.
        bias: shape (m,) or ``None``.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def weight_at(self, channels: int) -> torch.Tensor:
        """The first columns of the dense weight."""
        return self._weight[:, :channels]

    def bias_at(self, channels: int) -> torch.Tensor | None:
        """The dense bias."""
        return self._bias

    def slopes(self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None) -> torch.Tensor:
        """A channel joins with its own column, and nothing else moves."""
        return (self._weight.float() * weight_gradient).sum(dim=0)


def scale(moment: torch.Tensor) -> torch.Tensor:
    """What lambda is relative to: the mean of the moment's diagonal, a 0-dim tensor, never 0."""
    return moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def cholesky(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """C with C C^T = moment + ridge * scale(moment) * I.

    Args:
        moment: shape (n, n), symmetric positive semi-definite up to rounding.
        ridge: lambda, > 0.

    Returns:
        lower triangular, shape (n, n), the moment's dtype.

    Raises:
        CalibrationError: not positive definite even so, or not finite.
    """
    if not torch.isfinite(torch.stack(torch.aminmax(moment))).all():  # NaN is the least and the greatest
        raise CalibrationError("the inputs' second moment holds NaN or infinity", hint=OVERFLOW_HINT)
    regularised = moment.clone()
    regularised.diagonal().add_(ridge * scale(moment))
    lower: torch.Tensor
    lower, info = torch.linalg.cholesky_ex(regularised)
    if int(info) != 0:
        raise CalibrationError(
            f"the second moment ({moment.shape[0]} channels) with ridge {ridge:g} is not positive definite",
            hint="Raise prune.ridge, or data.calibration_tokens.",
        )
    return lower


def inverse(lower: torch.Tensor) -> torch.Tensor:
    """D = C^-1, lower triangular, shape and dtype of ``lower``."""
    eye = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    result: torch.Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return result


class NestedRidge(ConsumerPath):
    """The refit of one consumer at every level, from one factorisation in float64, kept in float32.

    Args:
        weight: dense W, shape (m, n), path order.
        moment: G, shape (n, n), path order; the covariance for the affine form.
        ridge: lambda, relative to the mean of the moment's diagonal, > 0.
        mean: E[x], shape (n,), for the affine form; ``None`` for the linear one.
        bias: dense bias, shape (m,), or ``None``; the affine form starts from zeros then.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        ridge: float,
        mean: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        lower = cholesky(in_float64(moment), ridge)
        projected, D = in_float64(weight) @ lower, inverse(lower)
        self._weight = weight  # the model's own tensor: no copy
        self._projected = projected.float().to(weight.device)
        self._inverse = D.float().to(weight.device)
        self._bias = None if bias is None else bias.float()
        self._mean = None  # D mu: W mu = B D mu, and the first k channels carry B[:, :k] (D mu)[:k] of it
        if mean is not None:
            self._mean = (D @ in_float64(mean)).float().to(weight.device)
            self._bias = weight.new_zeros(len(weight), dtype=torch.float32) if bias is None else self._bias
        self.removal_error = suffix_energy(projected.square().sum(dim=0))

    @classmethod
    def restored(
        cls, weight: torch.Tensor, factors: Mapping[str, torch.Tensor], bias: torch.Tensor | None
    ) -> NestedRidge:
        """A path whose `factors` have been kept: the same bits without a factorisation.

        Args:
            weight: dense W, shape (m, n), path order.
            factors: by name, on the weight's device.
            bias: dense bias, shape (m,), or ``None``.
        """
        path = cls.__new__(cls)
        path._weight, path._projected, path._inverse = weight, factors["projected"], factors["inverse"].T
        path._mean = factors.get("mean")
        path._bias = None if bias is None else bias.float()
        if path._mean is not None and bias is None:
            path._bias = weight.new_zeros(len(weight), dtype=torch.float32)
        path.removal_error = factors["removal_error"]
        return path

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """What it was computed for: contiguous tensors by name, the inverse transposed (as the solver lays it out)."""
        mean = {} if self._mean is None else {"mean": self._mean}
        return {
            "projected": self._projected.contiguous(),
            "inverse": self._inverse.T.contiguous(),
            "removal_error": self.removal_error,
            **mean,
        }

    @property
    def channels(self) -> int:
        """n, the dense width."""
        return self._weight.shape[1]

    @property
    def bytes(self) -> int:
        """Memory that the factors hold."""
        return sum(t.numel() * t.element_size() for t in (self._projected, self._inverse))

    def loss_increase(self, output_gradient: torch.Tensor) -> torch.Tensor:
        """Second-order estimate of what keeping the first k channels costs, for every k: 1/2 sum_{j >= k} b_j^T F b_j.

        The output error of level k has covariance B[:, k:] B[:, k:]^T (ridge term included), and F is the Fisher
        information of the output, in place of the loss's Hessian (as in K-FAC, arXiv 1503.05671).

        Args:
            output_gradient: F, shape (m, m).

        Returns:
            shape (n + 1,), float64, nats per token.
        """
        B, F = in_float64(self._projected), in_float64(output_gradient)
        return suffix_energy(0.5 * ((F @ B) * B).sum(dim=0))

    def weight_at(self, channels: int) -> torch.Tensor:
        """W'_K for the first ``channels`` channels, shape (m, channels), float32, by the cheaper of the two sides."""
        k = channels
        if 2 * k <= self.channels:
            return self._projected[:, :k] @ self._inverse[:k, :k]
        return self._weight[:, :k].float() - self._projected[:, k:] @ self._inverse[k:, :k]

    def bias_at(self, channels: int) -> torch.Tensor | None:
        """b' = b + W mu - W'_K mu_K = b + B[:, k:] (D mu)[k:], shape (m,), float32; without a mean, the dense bias."""
        if self._mean is None or self._bias is None:
            return self._bias
        return self._bias + self._projected[:, channels:] @ self._mean[channels:]

    def slopes(self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None) -> torch.Tensor:
        """Channel k joins with a change B[:, k] D[k, :] of the whole weight, and takes its mean off the bias."""
        weights = ((self._projected.T @ weight_gradient) * self._inverse).sum(dim=1)
        if self._mean is None or bias_gradient is None:
            return weights
        return weights - (self._projected.T @ bias_gradient) * self._mean


def suffix_energy(columns: torch.Tensor) -> torch.Tensor:
    """What is left out when the first k columns are kept: the sum over columns k .. n, for k = 0 .. n.

    Args:
        columns: energy of each column, shape (n,).

    Returns:
        shape (n + 1,), non-increasing, last entry 0.
    """
    reverse = torch.cumsum(columns.flip(0), dim=0).flip(0)
    return torch.cat([reverse, reverse.new_zeros(1)])


def pick_ridge(
    weight: torch.Tensor,
    moment: torch.Tensor,
    held_out: torch.Tensor,
    mean: torch.Tensor | None = None,
    *,
    grid: Sequence[float] = RIDGE_GRID,
    levels: Sequence[float] = HELD_OUT_LEVELS,
) -> float:
    """The lambda of the grid with the least output error on held-out inputs, which the moment has not seen.

    Args:
        weight: W, shape (m, n), path order.
        moment: G of the fitted inputs, shape (n, n), path order; their covariance for the affine form.
        held_out: X, shape (rows, n), path order, any floating dtype.
        mean: E[x] of the fitted inputs, shape (n,), for the affine form, whose bias carries it; else ``None``.
        grid: lambdas to try.
        levels: shares of channels kept at which the error is taken; each counts relative to the best of the grid.

    Returns:
        the chosen lambda.

    Raises:
        CalibrationError: with none of the grid is the moment positive definite.
    """
    W, X = weight.to(moment.device).float(), held_out.to(moment.device).float()
    if mean is not None:
        X = X - mean.to(X)
    width = W.shape[1]
    kept = [min(max(round(level * width), 1), width) for level in levels]
    errors = torch.zeros(len(grid), len(levels), dtype=torch.float64)
    for row, ridge in enumerate(grid):
        try:
            lower = _cholesky_in_float32(moment, ridge)
        except CalibrationError:  # sums in float32 left it indefinite; a larger one may do
            if ridge == max(grid):
                raise
            errors[row] = math.inf
            continue
        errors[row] = refit_errors(W, lower, X, kept)
    errors = errors / errors.amin(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return float(grid[int(errors.sum(dim=1).argmin())])


def _cholesky_in_float32(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """Exact enough to compare errors, and half the time, unless rounding leaves the moment indefinite."""
    try:
        return cholesky(moment.float(), ridge)
    except CalibrationError:
        return cholesky(in_float64(moment), ridge).float()


def refit_errors(weight: torch.Tensor, lower: torch.Tensor, inputs: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Squared output error of the refit at several levels, ||W x - W'_K x_K||^2 = ||B[:, k:] (D x)[k:]||^2, over x.

    No refit is formed, and D neither: one triangular solve gives D x for all inputs and levels, and a level adds to the
    error of the level above it what its own channels add.

    Args:
        weight: W, shape (m, n), float32.
        lower: C, shape (n, n), float32.
        inputs: X, shape (rows, n), float32.
        kept: channels kept, k, at every level.

    Returns:
        sums over the rows, shape (levels,), float64.
    """
    white = torch.linalg.solve_triangular(lower, inputs.T, upper=False)
    left, end = weight.new_zeros(len(weight), len(inputs)), lower.shape[0]
    errors = {}
    for k in sorted(kept, reverse=True):
        B = weight[:, k:] @ lower[k:, k:end]
        left.addmm_(B, white[k:end])
        errors[k] = float(left.square().sum())
        end = k
    numbers = [errors[k] for k in kept]
    return torch.tensor(numbers, dtype=torch.float64)


def sequential_refit(
    weight: torch.Tensor,
    cross: torch.Tensor,
    moment: torch.Tensor,
    ridge: float,
    anchor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Refit a consumer on the inputs that the pruned model really gives it, towards the dense model's outputs.

        W' = (W E[x x~^T] + l W_0) (E[x~ x~^T] + l I)^-1,   l = ridge * mean(diag E[x~ x~^T])

    Args:
        weight: dense W, shape (m, n), path order.
        cross: E[x x~^T], dense inputs against the pruned model's k inputs, shape (n, k), float64 (centred for affine).
        moment: E[x~ x~^T], shape (k, k), float64 (centred for affine).
        ridge: lambda, > 0.
        anchor: W_0, what a strong ridge pulls towards, shape (m, k); the dense columns W_K where left out.

    Returns:
        W', shape (m, k), float32.
    """
    k = moment.shape[0]
    W = in_float64(weight)
    lower = cholesky(moment, ridge)
    right = W @ cross + ridge * scale(moment) * (W[:, :k] if anchor is None else in_float64(anchor))
    return torch.cholesky_solve(right.T, lower).T.float()
