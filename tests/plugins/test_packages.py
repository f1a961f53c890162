"""The three packages in plugins/, as installed: a run uses all of them by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ffgym import run
from ffgym.config.tables import RunConfig
from ffgym.plugins import discovery, manager

NAMES = ("optuna", "output-energy", "decode-energy")


@pytest.fixture(autouse=True)
def _only_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, ",".join(NAMES))


def test_they_are_installed_and_load() -> None:
    loaded = {record.name: record.failure for record in manager.records()}
    assert loaded == {"built-in": None, **dict.fromkeys(NAMES)}


def test_a_run_uses_all_three(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    tables = {
        "agent": {"name": "optuna", "sampler": "RandomSampler"},
        "criterion": {"name": "output-energy", "shared": 0.25},
        "prune": {"resource": "decode-energy", "context": 32},
        "search": {**tiny_run["search"], "episodes": 8, "random_baseline": False},
        "output": {"dir": str(tmp_path / "out")},
        "tracking": {"enabled": False},
    }
    result = run(RunConfig.model_validate({**tiny_run, **tables}), progress=Console(file=io.StringIO()))
    allocation = json.loads((result.folder / "allocation.json").read_text())
    assert allocation["resource"] == "decode-energy"
    assert allocation["sparsity"] >= 0.2
    assert "mJ/token" in (result.folder / "report.md").read_text()
    assert any(row.label.startswith("optuna") for row in result.table.rows)
