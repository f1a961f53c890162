"""What all searches of one configuration share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ffgym.config.tables import RunConfig
from ffgym.pipeline.task import Task

COUNTING = """
import ffgym
from ffgym.heuristics.uniform import Uniform

class Counting(Uniform):
    name = "counting"
    asked = []

    def importance(self, views):
        self.asked.append(self.target)
        return super().importance(views)

@ffgym.hookimpl
def ffgym_heuristics():
    return [Counting]
"""


def test_a_heuristic_is_asked_once_for_a_target(
    make_env: Callable[..., Any], prepared_llama: Any, install: Callable[..., None]
) -> None:
    """Some take seconds: an eigendecomposition of every weight."""
    install("acme-counting", COUNTING)
    nothing: Any = None
    task = Task(RunConfig(), nothing, nothing, prepared_llama, make_env(sparsity=0.3), nothing, {})
    for target in (0.3, 0.3, 0.2):
        task.project("counting", {}, target)
    assert importlib.import_module("acme_counting").Counting.asked == [0.3, 0.2]
