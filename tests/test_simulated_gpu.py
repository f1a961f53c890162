"""Whole runs on a simulated GPU: what mixes its tensors with the CPU's fails here as on a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.evaluation.perplexity import evaluate
from ffgym.prepare.parts import load_parts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch cannot have a device that is written in Python",
    ),
]

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "settings",
    [
        ["model.device=cuda", "recover.method=lora", "recover.tokens=512", "criterion.name=taylor"],
        ["model.device=cuda", "model.placement=stream"],
    ],
    ids=["in memory, then trained", "streamed"],
)
def test_a_run_searches_reports_and_saves(settings: list[str], tiny_run: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate(tiny_run)
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    short = ["search.episodes=8", "search.random_baseline=false", "tracking.enabled=false", "prune.ridge=0.1"]
    training = ["recover.batch_tokens=256", "recover.held_out_tokens=128"]
    changes = [part for setting in (*settings, *short, *training) for part in ("--set", setting)]
    command = [sys.executable, HERE / "simulated_gpu.py", "run", "--config", "run.toml", "--output", "out", *changes]
    environment = {**os.environ, "FFGYM_CACHE": str(tmp_path / "cache"), "FFGYM_CACHE_SIZE": "1GB"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "float32 on cuda" in done.stdout + done.stderr
    dense, *pruned = json.loads((tmp_path / "out" / "report.json").read_text())
    loaded, splits = load_parts(config)
    assert dense["perplexity"] == pytest.approx(evaluate(loaded.model, splits.report.windows).perplexity, rel=1e-4)
    assert any("lora" in row["label"] for row in pruned) == ("recover.method=lora" in settings)
    assert list((tmp_path / "out" / "model").glob("*.safetensors"))
