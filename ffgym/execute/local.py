"""Measuring in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffgym.evaluation.evaluator import Evaluator, OnProgress, Request
    from ffgym.types import Evaluation


class LocalExecutor:
    """Makes an evaluator when the first requests come, and hands them to it.

    Args:
        make_evaluator: how to make one.
    """

    def __init__(self, make_evaluator: Callable[[], Evaluator]) -> None:
        self._make_evaluator = make_evaluator

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._make_evaluator()

    def measure(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Evaluation]:
        """Measure every request, in the order asked for; see `Executor`."""
        return self._evaluator.measure(requests, on_progress)
