"""The demo model's zero-shot figures are those of lm-eval's own command, to the digit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import task_wheel

from ffgym.data.assets import SMOLLM2, fetch
from ffgym.data.task_data import reported_split
from ffgym.measure.task_definitions import PAPER_TASKS
from ffgym.models.dequantise import dequantised

pytest.importorskip("lm_eval")

TASKS = (*PAPER_TASKS, "lambada_openai")
LIMIT = 2


@pytest.mark.demo
def test_the_dense_demo_models_figures_are_lm_evals(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffgym", "eval", "--model", "dense", "--tasks", ",".join(TASKS), "--json"]
    command += ["--limit", str(LIMIT), "--dtype", "float32", "--device", "cpu", "--data", "wheel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    (dense,) = data["models"]
    assert [mean["stderr"] is not None for mean in dense["paper_means"].values()] == [True, True]

    folder = dequantised(next(fetch(SMOLLM2).glob("*.gguf")), SMOLLM2.sha256)
    splits = {task: reported_split(task) for task in TASKS}
    own = task_wheel.lm_eval_command(folder, splits, tmp_path / "scratch", "--limit", str(LIMIT))
    for task in TASKS:
        found = dense["tasks"][task]
        assert (found["examples"], found["split"]) == (LIMIT, splits[task])
        for name, metric in found["metrics"].items():
            assert metric["value"] == own[task][f"{name},none"], (task, name)
            assert metric["stderr"] == own[task][f"{name}_stderr,none"], (task, name)
