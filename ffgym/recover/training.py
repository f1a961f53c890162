"""What every training here shares: which items a step learns from, how large the step is, and when it has failed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ffgym.errors import RecoveryError

WARM_UP_SHARE = 0.05
LARGEST_GRADIENT = 1.0  # gradients are clipped to this norm


def batch_at(step: int, size: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """The items of a step, counted from 0: indices below ``count``, shape (size,), int64.

    All are seen once, in a new order, before any is seen again. ``seed`` are any integers >= 0.
    """
    positions = np.arange(step * size, (step + 1) * size)
    epochs = range(positions[0] // count, positions[-1] // count + 1)
    order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs])
    chosen: np.ndarray = order[positions - epochs[0] * count]
    return chosen


def diverged(what: str, learning_rate: float) -> RecoveryError:
    """The error for a training whose loss is no number any more."""
    hint = f"Lower recover.learning_rate, now {learning_rate:g}, and start anew with --overwrite."
    return RecoveryError(f"training diverged: {what}", hint=hint)


def rate_at(step: int, steps: int, highest: float) -> float:
    """Learning rate of a step, counted from 0: a linear rise over the first twentieth, then half a cosine to near 0."""
    rise = max(1, round(WARM_UP_SHARE * steps))
    if step < rise:
        return highest * (step + 1) / rise
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))
