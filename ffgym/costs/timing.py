"""How long something takes: wall-clock seconds, device queues drained, the spread of repetitions, and threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")
LEAST_FOR_QUARTILES = 4


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements, and how far apart they lie."""

    median: float  # half of the repetitions lie below it
    low: float  # first quartile, or the lowest of few values
    high: float  # third quartile, or the highest of few values

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Median and quartiles; of fewer than 4 values, which have none, the lowest and the highest."""
        values = np.asarray(values, dtype=np.float64)
        outer = 0.0 if len(values) < LEAST_FOR_QUARTILES else 0.25
        low, median, high = np.quantile(values, (outer, 0.5, 1 - outer))
        return cls(float(median), float(low), float(high))


def ends(repetitions: int) -> str:
    """What the low and the high end of the spread of so many repetitions are: ``"quartiles"`` or ``"range"``."""
    return "range" if repetitions < LEAST_FOR_QUARTILES else "quartiles"


def timed(action: Callable[[], Result], devices: set[torch.device]) -> tuple[Result, float]:
    """What a call returns, and its seconds; accelerators among ``devices`` are waited for, before and after."""
    _synchronise(devices)
    begun = time.perf_counter()
    result = action()
    _synchronise(devices)
    return result, time.perf_counter() - begun


@contextmanager
def computing_threads(wanted: int | None) -> Iterator[None]:
    """Let torch compute with that many threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronise(devices: set[torch.device]) -> None:
    """Wait until accelerators have finished; a CPU has when the call returns."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
