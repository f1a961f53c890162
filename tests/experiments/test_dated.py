"""Experiments with results of earlier code: the committed tables are what the scripts make of the committed results."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("report", [["--report"], []], ids=["report", "run"])
@pytest.mark.parametrize(
    ("folder", "script"), [("range", "compare"), ("transfer", "transfer"), ("calibration-bias", "measure")]
)
def test_dated_results_are_shown_and_nothing_is_computed(
    folder: str, script: str, report: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXPERIMENTS / folder))
    here = shutil.copytree(EXPERIMENTS / folder, tmp_path / "copy")
    files = {path: path.read_bytes() for path in here.rglob("*.*") if path.suffix not in (".png", ".pyc")}
    (here / "demo.md").unlink()
    assert importlib.import_module(script).main([str(here / "demo.toml"), *report]) == 0
    assert {path: path.read_bytes() for path in files} == files
