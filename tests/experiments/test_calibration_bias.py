"""The experiment on ridge in the reward: what it computes once, what it says, and how it fails."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from glass_runs import glass_tables
from rich.console import Console

from ffgym.errors import ConfigError
from ffgym.plugins import discovery
from ffgym.report.progress import Reporter

SCRIPT = Path(__file__).parents[2] / "experiments" / "calibration-bias" / "measure.py"
TRAINING = {"tokens": 128, "batch_tokens": 64, "held_out_tokens": 64}
FOUND, BLIND = [2, 200] * 4, [1, 256] * 4


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_calibration_bias", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _only_builtins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Allocations as a run and as a bench write them, and the experiment's file."""
    (tmp_path / "allocation.json").write_text(json.dumps({"kept": FOUND}))
    (tmp_path / "cell.json").write_text(json.dumps({"agent": "reinforce", "final": {"kept": BLIND}}))
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    tables = glass_tables(folder)
    content = {
        "title": "Ridge or not",
        "results": "results",
        "seeds": [0, 1],
        "allocations": {"with ridge": "allocation.json", "without": "cell.json", "uniform": "uniform"},
        "run": {name: tables[name] for name in ("model", "data", "prune", "search")},
        "lora": TRAINING,
        "distil-mlp": TRAINING,
    }
    (folder / "bias.toml").write_text(tomli_w.dumps({**content, **changes}))
    return folder / "bias.toml"


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO(), width=300))


@pytest.mark.usefixtures("drawn")
def test_every_cell_is_computed_once_and_the_tables_are_written(
    script: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = script.measure(home / "bias.toml", reporter=quiet())
    results = {path.name for path in (home / "results").iterdir()}
    assert len(results) == 3 * (2 + 2 * 2)
    assert "with ridge -- lora -- seed1.json" in results
    assert (home / "bias.md").read_text() == text
    assert (home / "bias.png").read_bytes().startswith(b"\x89PNG")
    for part in ("## Loss above dense", "## Lead of 'with ridge'", "less what it is after ridge", "from ridge to lora"):
        assert part in text

    cell = json.loads((home / "results" / "without -- distil-mlp -- seed1.json").read_text())
    assert (cell["kept"], cell["seed"], len(cell["losses"]), cell["tokens_per_window"]) == (BLIND, 1, 16, 63)
    by_name = {name: json.loads((home / "results" / name).read_text())["losses"] for name in results}
    assert by_name["uniform -- lora -- seed0.json"] != by_name["uniform -- lora -- seed1.json"]
    assert by_name["uniform -- none.json"] != by_name["uniform -- ridge.json"]

    (home / "results" / "uniform -- lora -- seed0.json").unlink()
    computed = []
    compute = script.compute
    monkeypatch.setattr(script, "compute", lambda cells, bed: (computed.extend(cells), compute(cells, bed)))
    script.measure(home / "bias.toml", reporter=quiet())
    assert [cell.path.name for cell in computed] == ["uniform -- lora -- seed0.json"]
    again = json.loads((home / "results" / "uniform -- lora -- seed0.json").read_text())["losses"]
    assert again == by_name["uniform -- lora -- seed0.json"]

    monkeypatch.setattr(script, "Bed", lambda *_: pytest.fail("computed"))
    assert script.main([str(home / "bias.toml"), "--report"]) == 0
    monkeypatch.undo()
    (home / "bias.toml").write_text((home / "bias.toml").read_text().replace("tokens = 128", "tokens = 192"))
    with pytest.raises(ConfigError, match="another configuration"):
        script.measure(home / "bias.toml", reporter=quiet())


def result(script: Any, allocation: str, recovery: str, losses: list[float], seed: int = 0) -> Any:
    return script.CellResult(
        allocation=allocation, recovery=recovery, seed=seed, digest="", kept=[1], sparsity=0.2, losses=losses,
        dense_losses=[1.0, 1.0], tokens_per_window=8, dtype="float32", threads=1, seconds=0.0,
    )  # fmt: skip


def test_leads_are_paired_over_windows_and_compared_with_ridge(script: Any) -> None:
    losses = script.Losses(
        [
            result(script, "ours", "ridge", [2.0, 3.0]),
            result(script, "theirs", "ridge", [2.5, 3.5]),
            result(script, "ours", "lora", [1.5, 2.5], 0),
            result(script, "ours", "lora", [1.7, 2.7], 1),
            result(script, "theirs", "lora", [1.6, 2.6], 0),
            result(script, "theirs", "lora", [1.6, 2.6], 1),
        ]
    )
    assert losses.lead("theirs", "ridge") == script.Estimate(0.5, 0.0, None)
    after = losses.lead("theirs", "lora")  # 0.1 with one seed, -0.1 with the other
    assert (after.mean, after.windows) == (pytest.approx(0.0), pytest.approx(0.0))
    assert after.seeds == pytest.approx(0.1)
    assert losses.shrinkage("theirs", "lora").mean == pytest.approx(-0.5)
    (sentence,) = script.verdicts(losses)
    assert "the lead of 'ours' shrinks (-0.5000" in sentence
    assert "after lora it cannot be told from it" in sentence


def test_an_estimate_has_both_errors(script: Any) -> None:
    differences = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    found = script.estimate(differences)
    assert found.mean == 3.0
    assert found.windows == pytest.approx(1 / np.sqrt(3))
    assert found.seeds == pytest.approx(1.0)
    assert found.error == pytest.approx(np.hypot(1 / np.sqrt(3), 1.0))


@pytest.mark.parametrize("file", ["demo.toml", "search.toml"])
def test_the_committed_files_are_valid(script: Any, file: str) -> None:
    from ffgym.bench.checks import check_benches
    from ffgym.bench.file import read_bench

    if file == "search.toml":
        bench = read_bench(SCRIPT.parent / file)
        assert bench.spec.dated
        check_benches([bench])
        assert bench.results, "the committed results are shown"
    else:
        spec, config = script.read_experiment(SCRIPT.parent / file)
        assert spec.lora.tokens == spec.distil_mlp.tokens
        assert config.model.name == "demo"
