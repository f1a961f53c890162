"""How long something takes: wall-clock seconds, device queues drained, and the spread of repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements, and how far apart they lie.

    Attributes:
        median: half of the repetitions lie below it.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Median and quartiles of at least one value."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))


def timed(action: Callable[[], Result], devices: set[torch.device]) -> tuple[Result, float]:
    """What a call returns, and its seconds; accelerators among ``devices`` are waited for, before and after."""
    _synchronise(devices)
    begun = time.perf_counter()
    result = action()
    _synchronise(devices)
    return result, time.perf_counter() - begun


def _synchronise(devices: set[torch.device]) -> None:
    """Wait until accelerators have finished; a CPU has when the call returns."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
