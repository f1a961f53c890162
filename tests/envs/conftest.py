"""What tests of environments share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def break_half() -> Callable[..., None]:
    """``break_half(half)``: cut below so many channels, its weights are all that value."""
    import torch

    from ffgym.pruning.calibration import PlainPath

    def broken(half: Any, value: float = math.nan, below: float = math.inf) -> None:
        class Broken(PlainPath):
            def weight_at(self, channels: int) -> torch.Tensor:
                weight = super().weight_at(channels)
                return torch.full_like(weight, value) if channels < below else weight

        half.path = Broken(*half.dense_consumer)

    return broken
