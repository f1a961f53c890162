"""Refit the consumer after units were removed: nested ridge for every level from one factorisation.

The problem (docs/mathematics.md): for a consumer W (m x n) with channels in path order, inputs x with second moment
G = E[x x^T], the first k channels kept (K) and the rest dropped (P), l = lambda * mean(diag G):

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch

from ffgym.errors import CalibrationError
from ffgym.pruning.factors import (
    LEVELS,
    ROWS,
    as_factor,
    factor_dtype,
    factorise_,
    grid,
    inverse_,
    packed,
    products_in,
    times_lower,
    unpacked,
)
from ffgym.pruning.precision import copy_in_float64, in_float64
from ffgym.pruning.statistics import OVERFLOW_HINT

RIDGE_GRID = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT_LEVELS = (0.75, 0.5)
SKETCHED = 128  # random sums of the outputs, whose errors choose lambda


class ConsumerPath(ABC):
    """A consumer's weights at every level: keep the first ``channels`` columns."""

    @abstractmethod
    def weight_at(self, channels: int) -> torch.Tensor:
        """The consumer's weight for the kept channels, shape (m, channels), float32."""

    def weights_at(self, levels: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Weights at several levels, each once, highest first, with the bits that `weight_at` gives each."""
        for channels in sorted(set(levels), reverse=True):
            yield channels, self.weight_at(channels)

    @abstractmethod
    def bias_at(self, channels: int) -> torch.Tensor | None:
        """The consumer's bias at that level, shape (m,), float32; ``None`` where it has none."""

    def slopes(
        self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None, start: int, end: int
    ) -> torch.Tensor:
        """First-order change of the loss as each of some channels joins those before it: <dL/dW, W_(k+1) - W_k>.

        Args:
            weight_gradient: dL/dW of the consumer at full width, shape (m, n), float32.
            bias_gradient: dL/db, shape (m,), float32; ``None`` where it has no bias.
            start: the first of them.
            end: one past the last, > start.

        Returns:
            shape (end - start,), float32; negative where the channel helps.
        """
        losses = []
        for channels in range(start, end + 1):
            loss = (self.weight_at(channels).float() * weight_gradient[:, :channels]).sum()
            bias = self.bias_at(channels)
            losses.append(loss if bias is None or bias_gradient is None else loss + bias.float() @ bias_gradient)
        return torch.stack(losses).diff()


class PlainPath(ConsumerPath):
    """Plain removal: the kept columns of the weight, shape (m, n), as they are, and the bias, shape (m,)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def weight_at(self, channels: int) -> torch.Tensor:
        """The first columns of the dense weight."""
        return self._weight[:, :channels]

    def bias_at(self, channels: int) -> torch.Tensor | None:
        """The dense bias."""
        return self._bias

    def slopes(
        self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None, start: int, end: int
    ) -> torch.Tensor:
        """A channel joins with its own column, and no other column changes."""
        return (self._weight[:, start:end].float() * weight_gradient[:, start:end]).sum(dim=0)


def scale(moment: torch.Tensor) -> torch.Tensor:
    """The mean of the moment's diagonal, which lambda is relative to; a 0-dim tensor, never 0."""
    return moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)


def cholesky_(moment: torch.Tensor, ridge: float, relative_to: torch.Tensor | None = None) -> torch.Tensor:
    """C with C C^T = moment + ridge * scale(moment) * I.

    Args:
        moment: shape (n, n), symmetric positive semi-definite up to rounding; it may be overwritten.
        ridge: lambda, > 0.
        relative_to: in place of scale(moment); for a part of a moment, the scale of the whole.

    Returns:
        lower triangular, shape (n, n), the moment's dtype.

    Raises:
        CalibrationError: not positive definite even with the ridge, or not finite.
    """
    if not torch.isfinite(torch.stack(torch.aminmax(moment))).all():  # NaN is the least and the greatest
        raise CalibrationError("the inputs' second moment holds NaN or infinity", hint=OVERFLOW_HINT)
    moment.diagonal().add_(ridge * (scale(moment) if relative_to is None else relative_to).to(moment))
    lower, failed = factorise_(moment)
    if int(failed) != 0:
        raise CalibrationError(
            f"the second moment ({moment.shape[0]} channels) with ridge {ridge:g} is not positive definite",
            hint="Raise prune.ridge, or data.calibration_tokens.",
        )
    return lower


class NestedRidge(ConsumerPath):
    """The refit of one consumer at every level, from one factorisation.

    A refit starts from the nearest level above it of a fixed grid, W'_k = W'_g[:, :k] - B[:, k:g] D[k:g, :k], and that
    one from the next above, down from the dense weight. So it depends on k alone, and not on which other levels were
    asked for. Products round B and D to the model's dtype; sums, and the refits on the grid, are float32.

    Args:
        weight: dense W, shape (m, n), path order.
        moment: G, shape (n, n), path order; the covariance for the affine form. It may be overwritten.
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
        n, device = weight.shape[1], weight.device
        dtype = factor_dtype(n)
        lower = cholesky_(as_factor(moment, n), ridge)
        del moment
        projected = times_lower(as_factor(weight, n), lower)
        removal_error = suffix_energy(in_float64(projected.square().sum(dim=0)))
        factors = {"projected": projected.to(dtype).to(device), "removal_error": removal_error}
        del projected
        D = inverse_(lower)
        if mean is not None:  # D mu: W mu = B D mu, and the first k channels carry B[:, :k] (D mu)[:k] of it
            factors["mean"] = (D @ mean.to(D)).float().to(device)
        self._set(weight, {**factors, "inverse": packed(D, dtype).to(device)}, bias)

    @classmethod
    def restored(
        cls, weight: torch.Tensor, factors: Mapping[str, torch.Tensor], bias: torch.Tensor | None
    ) -> NestedRidge:
        """A path whose `factors` have been kept, on the weight's device: the same bits without a factorisation."""
        path = cls.__new__(cls)
        path._set(weight, factors, bias)
        return path

    def _set(self, weight: torch.Tensor, factors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        self._weight = weight  # the model's own tensor: no copy
        self._projected, self._inverse = factors["projected"], factors["inverse"]
        self._mean = factors.get("mean")
        self.removal_error = factors["removal_error"]
        self._bias = None if bias is None else bias.float()
        if self._mean is not None and bias is None:
            self._bias = weight.new_zeros(len(weight), dtype=torch.float32)

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """The factors, contiguous tensors by name, from which `restored` makes the same path."""
        mean = {} if self._mean is None else {"mean": self._mean}
        return {
            "projected": self._projected,
            "inverse": self._inverse,
            "removal_error": self.removal_error,
            **mean,
        }

    @property
    def channels(self) -> int:
        """n, the dense width."""
        return self._weight.shape[1]

    def loss_increase(self, output_gradient: torch.Tensor) -> torch.Tensor:
        """Second-order estimate of the loss added by keeping the first k channels: 1/2 sum_{j >= k} b_j^T F b_j.

        The output error of level k has covariance B[:, k:] B[:, k:]^T (ridge term included), and F is the Fisher
        information of the output, in place of the loss's Hessian (as in K-FAC, arXiv 1503.05671).

        Args:
            output_gradient: F, shape (m, m).

        Returns:
            shape (n + 1,), float64, nats per token.
        """
        B, F = as_factor(self._projected, self.channels), as_factor(output_gradient, self.channels)
        return suffix_energy(in_float64(0.5 * ((F @ B) * B).sum(dim=0)))

    def weight_at(self, channels: int) -> torch.Tensor:
        """W'_K for the first ``channels`` channels, shape (m, channels), float32."""
        ((_, weight),) = self.weights_at([channels])
        return weight

    def weights_at(self, levels: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The weights at several levels, in one sweep down the grid."""
        wanted = sorted(set(levels), reverse=True)
        if not wanted:
            return
        refit = self._weight.to(torch.float32, copy=True)
        at, stops = self.channels, list(grid(self.channels))
        for k in wanted:
            while k and stops and stops[0] >= k:
                stop = stops.pop(0)
                self._lower(refit[:, :stop], stop, at, out=refit[:, :stop])
                at = stop
            yield k, self._lower(refit[:, :k], k, at) if 0 < k < at else refit[:, :k].clone()

    def _lower(self, weight: torch.Tensor, k: int, at: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """W'_k, from the first k columns of W'_at."""
        B, D = self._projected[:, k:at].float(), unpacked(self._inverse, self.channels, k, at)[:, :k]
        with products_in(self._weight.dtype):
            return torch.addmm(weight, B, D, alpha=-1, out=out)

    def bias_at(self, channels: int) -> torch.Tensor | None:
        """b' = b + W mu - W'_K mu_K = b + B[:, k:] (D mu)[k:], shape (m,), float32; without a mean, the dense bias."""
        if self._mean is None or self._bias is None:
            return self._bias
        return self._bias + self._projected[:, channels:].float() @ self._mean[channels:]

    def slopes(
        self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None, start: int, end: int
    ) -> torch.Tensor:
        """Channel k joins with a change B[:, k] D[k, :] of the whole weight, and takes its mean off the bias."""
        step, parts = ROWS * LEVELS, []
        for first in range(start, end, step):
            last = min(first + step, end)
            B = self._projected[:, first:last].float()
            D = unpacked(self._inverse, self.channels, first, last)
            part = ((B.T @ weight_gradient[:, :last]) * D).sum(dim=1)
            if self._mean is not None and bias_gradient is not None:
                part -= (B.T @ bias_gradient) * self._mean[first:last]
            parts.append(part)
        return torch.cat(parts)


def suffix_energy(columns: torch.Tensor) -> torch.Tensor:
    """Energy of the columns from k on, for k = 0 .. n, given that of each, shape (n,) -> (n + 1,)."""
    reverse = torch.cumsum(columns.flip(0), dim=0).flip(0)
    return torch.cat([reverse, reverse.new_zeros(1)])


def pick_ridge(
    weight: torch.Tensor,
    moment: torch.Tensor,
    held_out: torch.Tensor,
    mean: torch.Tensor | None = None,
    *,
    grid: Sequence[float] = RIDGE_GRID,
) -> float:
    """The lambda of the grid with the least output error on held-out inputs, which are not part of the moment.

    What counts is the geometric mean of the errors at `HELD_OUT_LEVELS`, shares of the channels that are kept. It is
    taken to fall and rise once along the grid: from its middle, lambdas are tried downhill.

    Args:
        weight: W, shape (m, n), path order.
        moment: G of the fitted inputs, shape (n, n), path order; their covariance for the affine form.
        held_out: X, shape (rows, n), path order, any floating dtype.
        mean: E[x] of the fitted inputs, shape (n,), for the affine form, whose bias carries it; else ``None``.
        grid: lambdas to try, rising.

    Returns:
        the chosen lambda.

    Raises:
        CalibrationError: the moment is not positive definite with any of them.
    """
    W, X = sketch(weight.to(moment.device).float()), held_out.to(moment.device).float()
    if mean is not None:
        X = X - mean.to(X)
    n = W.shape[1]
    kept = [min(max(round(level * n), 1), n) for level in HELD_OUT_LEVELS]
    wanted, G = W @ X.T, moment.float()
    lost = {k: W[:, k:] @ G[k:, :k] for k in kept}  # W_P G_PK
    top = max(kept)

    @cache
    def error(index: int) -> float:
        try:
            lower = _cholesky_in_float32(moment[:top, :top], grid[index], scale(moment))
        except CalibrationError:  # sums in float32 left it indefinite; a larger lambda may do
            if index == len(grid) - 1:
                raise
            return math.inf
        left = (wanted - refit_outputs(W, lost[k], lower, X, k) for k in kept)
        return sum(math.log(max(float(each.square().sum()), torch.finfo(torch.float32).tiny)) for each in left)

    at = (len(grid) - 1) // 2
    step = 1 if at + 1 < len(grid) and error(at + 1) <= error(at) else -1
    while 0 <= at + step < len(grid) and error(at + step) <= error(at):
        at += step
    return float(grid[at])


def sketch(weight: torch.Tensor) -> torch.Tensor:
    """At most `SKETCHED` random sums of W's outputs, whose error is on average that of all outputs."""
    if len(weight) <= SKETCHED:
        return weight
    signs: torch.Tensor = torch.randn(SKETCHED, len(weight), generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = (signs / SKETCHED**0.5).to(weight) @ weight
    return result


def _cholesky_in_float32(moment: torch.Tensor, ridge: float, relative_to: torch.Tensor) -> torch.Tensor:
    """Exact enough to compare errors, and half the time, unless rounding leaves the moment indefinite."""
    try:
        return cholesky_(moment.to(torch.float32, copy=True), ridge, relative_to)
    except CalibrationError:
        return cholesky_(copy_in_float64(moment), ridge, relative_to).float()


def refit_outputs(
    weight: torch.Tensor, lost: torch.Tensor, lower: torch.Tensor, inputs: torch.Tensor, kept: int
) -> torch.Tensor:
    """W'_K x_K over the rows of X, shape (m, rows), float32.

    ``weight`` is W, ``lost`` W_P G_PK, shape (m, kept), and ``lower`` C, the factor of at least ``kept`` channels.
    """
    change: torch.Tensor = torch.cholesky_solve(lost.T, lower[:kept, :kept]).T
    refit: torch.Tensor = weight[:, :kept] + change
    return refit @ inputs[:, :kept].T
