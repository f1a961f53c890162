"""The executor decides where evaluators run."""

from __future__ import annotations

from typing import Protocol

from ffgym.evaluation.evaluator import Evaluator


class Executor(Evaluator, Protocol):
    """Has requests measured. Where, and by how many evaluators, changes no bit of what comes back.

    An evaluator is the executor of its own process.
    """
