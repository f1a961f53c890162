"""Running averages over a consumer's inputs, in float32 or wider whatever the model's dtype."""

from __future__ import annotations

import torch

from ffgym.errors import CalibrationError
from ffgym.pruning.precision import float64_device, sum_in_float64
from ffgym.types import LayerStats

INPUT_STATISTICS = frozenset({"mean", "square", "second_moment"})
GRADIENT_STATISTICS = frozenset({"gradient", "output_gradient"})
OVERFLOW_HINT = "The model overflows on the calibration text: use --set model.dtype=float32 or bfloat16."


class Moments:
    """Accumulates E[x], E[x^2] and E[x x^T] of vectors x with n channels.

    Args:
        channels: n.
        needs: which of ``mean``, ``square``, ``second_moment`` to keep.
        device: where the sums live.
    """

    def __init__(self, channels: int, needs: frozenset[str], device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._device = torch.device(device)
        wide = float64_device(self._device)
        self._mean = torch.zeros(channels, dtype=torch.float64, device=wide) if "mean" in needs else None
        self._square = None
        self._second = None
        if "second_moment" in needs:
            self._second = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        elif "square" in needs:
            self._square = torch.zeros(channels, dtype=torch.float64, device=wide)
        self._wants_square = "square" in needs

    def update(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs.

        Args:
            inputs: shape (..., n), any floating dtype.
        """
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += x.shape[0]
        if self._mean is not None:
            self._mean += sum_in_float64(x)
        if self._square is not None:
            self._square += sum_in_float64(x.square())
        if self._second is not None:
            self._second.addmm_(x.T, x)

    def result(self) -> LayerStats:
        """Divide by the tokens seen."""
        count = max(self.tokens, 1)
        second = None if self._second is None else self._second / count
        square = None if self._square is None else (self._square / count).float().to(self._device)
        if second is not None and self._wants_square:
            square = second.diagonal().clone()
        return LayerStats(
            tokens=self.tokens,
            mean=None if self._mean is None else (self._mean / count).float().to(self._device),
            square=square,
            second_moment=second,
        )


def merge(first: LayerStats, second: LayerStats) -> LayerStats:
    """Pool two averages of the same consumer's inputs, weighted by their tokens (gradients are not pooled)."""
    total = first.tokens + second.tokens
    if not second.tokens:
        return first

    def pooled(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        if a is None or b is None:
            return None
        return (a * first.tokens + b * second.tokens) / total

    return LayerStats(
        tokens=total,
        mean=pooled(first.mean, second.mean),
        square=pooled(first.square, second.square),
        second_moment=pooled(first.second_moment, second.second_moment),
    )


def require_finite(*parts: LayerStats) -> None:
    """Refuse statistics of a model that overflows, before a criterion or a factorisation trips over them.

    Raises:
        CalibrationError: names the first statistic that holds NaN or infinity.
    """
    for stats in parts:
        for name, value in vars(stats).items():
            if torch.is_tensor(value) and not torch.isfinite(value).all():
                raise CalibrationError(
                    f"the {name.replace('_', ' ')} on the calibration text holds NaN or infinity", hint=OVERFLOW_HINT
                )
