"""What decides where evaluators run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ffgym.evaluation.evaluator import OnProgress, Request
    from ffgym.types import Evaluation


class Executor(Protocol):
    """Has requests measured. Where, and by how many evaluators, changes no bit of what comes back."""

    def measure(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Evaluation]:
        """Measure every request, in the order asked for.

        Args:
            requests: any number.
            on_progress: called with the share that is done, from 0 to 1.

        Raises:
            ModelError: the dense model's loss is not finite on a window.
        """
