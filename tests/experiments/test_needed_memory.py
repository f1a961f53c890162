"""The memory that runs need, stage by stage: each stage of a run counts as the one of the plan that it belongs to."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ffgym.config.tables import RunConfig
from ffgym.pipeline.plan import plan_run, planned_steps
from ffgym.plugins import manager

FOLDER = Path(__file__).parents[2] / "experiments" / "scale"


def test_every_stage_of_a_run_is_one_of_its_plan(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    memory = importlib.import_module("memory")
    config = RunConfig.model_validate(tiny_run)
    plan = plan_run(config, manager.create("agent", config.agent.name, config.agent.options))
    stages = [memory.stage_of(step.label) for step in planned_steps(config, plan)]
    assert stages[0] == "load"
    assert stages[-1] == "report"
    assert set(stages) <= {stage.name for stage in plan.stages}
