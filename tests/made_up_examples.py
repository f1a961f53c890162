"""Encoded multiple-choice questions for the tiny models."""

from __future__ import annotations

import numpy as np

from ffgym.data.examples import EncodedExample


def made_up_examples(count: int, task: str = "a", seed: int = 0) -> list[EncodedExample]:
    """Random questions of several lengths, with two to five answers."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, 128, rng.integers(low, high)))

    return [
        EncodedExample(task, ids(1, 12), tuple(ids(1, 6) for _ in range(rng.integers(2, 6))), int(rng.integers(2)))
        for _ in range(count)
    ]
