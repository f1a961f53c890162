"""lm-eval's own command on a model that ffgym saved, in a process that has no ffgym."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import task_wheel

from ffgym.evaluation import tasks
from ffgym.evaluation.tasks import evaluate_task, load_tasks
from ffgym.models.loading import load

pytest.importorskip("lm_eval")

# The command as it is typed; only the folders with lm-eval's 13,000 definitions are not read, which takes long.
COMMAND = """
import functools, sys
sys.modules["ffgym"] = None  # as if it were not installed
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_lm_evals_own_command_measures_a_saved_model_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "hub_answers", lambda: False)
    task_wheel.install(tmp_path, monkeypatch)
    dense = task_wheel.save_tiny_model(tmp_path / "dense")
    pruned = task_wheel.save_pruned_model(dense, tmp_path / "pruned")
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    task_wheel.write_definition(definitions, "piqa", "validation")
    arguments = ["--model", "hf", "--model_args", f"pretrained={pruned},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "piqa_here", "--include_path", str(definitions), "--device", "cpu", "--batch_size", "1"]
    arguments += ["--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    own = json.loads(file.read_text())["results"]["piqa_here"]
    (task,) = load_tasks(["piqa"]).tasks
    result = evaluate_task(load(str(pruned), dtype="float32", device="cpu"), task)
    assert {f"{metric.name},none": metric.value for metric in result.metrics}.items() <= own.items()
