"""What all searches of one configuration share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ffgym.config.tables import RunConfig
from ffgym.heuristics.uniform import Uniform
from ffgym.pipeline.task import Task


def test_a_heuristic_is_asked_once_for_a_target(
    make_env: Callable[..., Any], prepared_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take seconds: an eigendecomposition of every weight."""
    asked: list[float] = []
    once = Uniform.importance
    monkeypatch.setattr(Uniform, "importance", lambda self, views: asked.append(self.target) or once(self, views))
    nothing: Any = None
    task = Task(RunConfig(), nothing, nothing, prepared_llama, make_env(sparsity=0.3), nothing, {})
    for target in (0.3, 0.3, 0.2):
        task.project("uniform", {}, target)
    assert asked == [0.3, 0.2]
