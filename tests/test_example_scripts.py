"""Every script in examples/ does what its first line says, on a tiny model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import new_store

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml

EXAMPLES = Path(__file__).parent.parent / "examples"
CRITERION = runpy.run_path(str(EXAMPLES / "criterion.py"))


@pytest.fixture
def script(tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``script(name, *arguments)``: run it in a folder that holds a tiny ``run.toml``; its variables."""
    (tmp_path / "run.toml").write_text(to_toml(RunConfig.model_validate(tiny_run)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    new_store(tmp_path / "mlruns")

    def run(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_search_then_generate(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = script("search.py", "run.toml")["result"]
    assert "uniform + ridge" in capsys.readouterr().out
    script("generate.py", str(result.saved.path), "w1 w2")
    assert capsys.readouterr().out.startswith("w1 w2 w")


def test_compare(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = script("compare.py", "run.toml")["result"].table
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["reinforce", "pathwise", "mlp-first"]
    assert lines[-1][2].rstrip(",") == f"{table.saved.perplexity:.2f}", "its own, though uniform has less here"
    assert table.best.perplexity < table.saved.perplexity


def test_stable_baselines(script: Any) -> None:
    first, second = (script("stable_baselines.py", "run.toml")["kept"] for _ in range(2))
    assert len(first) == 6
    assert second == first
    assert Path("sb3-model/model.safetensors").is_file()


class TestCriterion(CRITERION["TestProduct"]):  # type: ignore[misc]
    """The test that the example brings along."""


def test_all_are_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"[{path.name}]({path.name})" not in listed] == []
