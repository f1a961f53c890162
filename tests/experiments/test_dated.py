"""Experiments with results of earlier code: the committed tables are what the scripts make of the committed results."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import made_up_tasks
import pytest
import tomli_w
from glass_runs import PER_UPDATE, WINDOW, glass_tables

from ffgym.bench.checks import check_benches
from ffgym.bench.file import read_bench
from ffgym.config.toml import read_toml
from ffgym.plugins import discovery

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPTS = [("range", "compare"), ("transfer", "transfer"), ("calibration-bias", "measure")]


@pytest.fixture
def here(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the experiment's folder, from which its script is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
    monkeypatch.syspath_prepend(str(EXPERIMENTS / folder))
    return shutil.copytree(EXPERIMENTS / folder, tmp_path / "copy")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.suffix not in (".png", ".pyc")}


@pytest.mark.parametrize("report", [["--report"], []], ids=["report", "run"])
@pytest.mark.parametrize(("folder", "script"), SCRIPTS)
def test_dated_results_are_shown_and_nothing_is_computed(script: str, report: list[str], here: Path) -> None:
    files = contents(here)
    (here / "demo.md").unlink()
    assert importlib.import_module(script).main([str(here / "demo.toml"), *report]) == 0
    assert contents(here) == files


TRAINING = {"tokens": 128, "batch_tokens": 64, "held_out_tokens": 64}
SMALL: dict[str, dict[str, Any]] = {
    "range": {"range": "0.2:0.3", "seeds": [0], "episodes": PER_UPDATE, "separate": [PER_UPDATE]},
    "transfer": {
        "seeds": [0],
        "per_search": 2,
        "heuristics": ["uniform", "mlp-first"],
        "text_tokens": 4 * WINDOW,
        "search_examples": 8,
        "report": {"arc_easy": 20, "piqa": 12, "sciq": 10},
    },
    "calibration-bias": {
        "allocations": {"uniform": "uniform", "mlp-first": "mlp-first"},
        "lora": TRAINING,
        "distil-mlp": TRAINING,
    },
}


@pytest.mark.parametrize(("folder", "script"), SCRIPTS)
def test_without_the_line_dated_they_are_computed_and_only_once(
    folder: str, script: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_tasks.install(monkeypatch)
    settings = {**read_toml(here / "demo.toml"), **SMALL[folder], "results": "small"}
    del settings["dated"]
    tables = glass_tables(tmp_path)
    settings["run"] = {name: tables[name] for name in ("model", "data", "prune", "search")}
    settings["run"]["prune"]["front_points"] = 2
    file = here / "small.toml"
    file.write_text(tomli_w.dumps(settings), encoding="utf-8")
    main = importlib.import_module(script).main
    assert main([str(file)]) == 0
    files = contents(here)
    assert any((here / "small").iterdir())
    assert here / "small.md" in files
    assert main([str(file)]) == 0
    assert contents(here) == files


def test_a_dated_bench_is_valid() -> None:
    bench = read_bench(EXPERIMENTS / "calibration-bias" / "search.toml")
    assert bench.spec.dated
    check_benches([bench])
    assert bench.results, "the committed results are shown"
