"""A whole run whose budget is measured latency: the same table, the same allocation, on record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glass_runs import WINDOW, glass_config, glass_home, go, stopping
from latency_tables import made_up_table
from mlflow_store import client, new_store, runs
from rich.console import Console

import ffgym
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.costs.latency_cache import place_of
from ffgym.costs.latency_table import LatencyTable, read_table, to_json
from ffgym.errors import BudgetError, ConfigError
from ffgym.files import write_text
from ffgym.models.loading import load
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.prepare.parts import make_reward
from ffgym.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("only_builtins")


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    """Made-up times of the trained tiny Llama: channels of its MLPs come in jumps."""
    return made_up_table(load(str(glass_home() / "glass"), dtype="float32").model, context=WINDOW)


def timed(folder: Path, table: LatencyTable | None, **changes: Any) -> RunConfig:
    """A run with a latency budget; the table is written to a file and named, or left to the cache."""
    prune: dict[str, Any] = {"resource": "latency", "ridge": 0.1, "context": WINDOW}
    if table is not None:
        path = folder / "given.json"
        path.write_text(to_json(table))
        prune["latency_table"] = str(path)
    return glass_config(folder, **({"prune": prune, "search": {"random_baseline": False}} | changes))


def test_a_run_counts_records_and_repeats_its_latency(tmp_path: Path, table: LatencyTable) -> None:
    root = new_store(tmp_path / "mlruns")
    result, said = go(timed(tmp_path, table, tracking={"enabled": True}))
    allocation = json.loads((result.folder / "allocation.json").read_text())
    assert allocation["resource"] == "latency"
    assert 0.2 <= allocation["sparsity"] < 0.3
    assert f"latency: {table.measured}; table {table.digest[:12]}" in said
    # The record: the folder, MLflow, the table's header, the card.
    assert read_table(result.folder / "latency.json").digest == table.digest
    (run,) = runs(root)
    assert run.data.params["latency.digest"] == table.digest
    assert "latency.json" in {item.path for item in client(root).list_artifacts(run.info.run_id)}
    assert result.table.header.endswith(f"Latency: {table.measured}.")
    assert "of the measured latency of its attention" in (result.folder / "model" / "README.md").read_text()
    # The rows: shares of the same resource.
    saved = result.table.saved
    assert saved.sparsity_prunable == pytest.approx(allocation["sparsity"])
    costs = {curve.shape.kind: curve.costs for curve in table.curves}
    tables = [costs[kind] for _ in range(4) for kind in ("attention", "mlp")]
    cut = sum(float(t[-1] - t[k]) for t, k in zip(tables, allocation["kept"], strict=True))
    assert saved.sparsity_model == pytest.approx(cut / max(50e9, sum(float(t[-1]) for t in tables)))
    # The table that the run has recorded gives the same allocation again.
    again = timed(
        tmp_path,
        None,
        prune={
            "resource": "latency",
            "ridge": 0.1,
            "context": WINDOW,
            "latency_table": str(result.folder / "latency.json"),
        },
        output={"dir": str(tmp_path / "again")},
    )
    repeated, _ = go(again)
    assert json.loads((repeated.folder / "allocation.json").read_text()) == allocation


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[LatencyTable], None]:
    """``cached(table)``: the table is what this machine's cache has of the small model."""
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    model = load(str(glass_home() / "glass"), dtype="float32").model
    return lambda table: write_text(place_of(model, context=WINDOW), to_json(table))


def test_without_a_file_the_cache_is_asked(tmp_path: Path, table: LatencyTable, cached: Any) -> None:
    cached(table)
    result, _ = go(timed(tmp_path, None, output={"save_model": False}))
    assert read_table(result.folder / "latency.json") == table


def test_a_run_that_goes_on_counts_the_times_that_it_has_counted(
    tmp_path: Path, table: LatencyTable, cached: Any, steps: list[int]
) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    cached(table)
    whole, _ = go(timed(tmp_path / "whole", None))
    steps[0] = len(steps) + 4
    config = timed(tmp_path / "parts", None)
    with pytest.raises(KeyboardInterrupt):
        go(config)
    steps[0] = 10**6
    # Timed anew since, on a busier machine.
    other = made_up_table(load(str(glass_home() / "glass"), dtype="float32").model, context=WINDOW, mlp=16e-3)
    assert other.digest != table.digest
    cached(other)
    folder = tmp_path / "parts" / "out"
    parts = ffgym.run(config, progress=Console(quiet=True), resume=folder)
    assert read_table(folder / "latency.json") == table
    for name in ("allocation.json", "latency.json", "report.md"):
        assert (parts.folder / name).read_text() == (whole.folder / name).read_text()


def test_the_table_of_another_model_is_refused_before_statistics(tmp_path: Path) -> None:
    config = timed(tmp_path, made_up_table(tiny_model("llama"), context=WINDOW))
    with pytest.raises(BudgetError, match=r"given\.json was timed on another model: hidden 32, here"):
        ffgym.run(config, progress=stopping("collect statistics", KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()


def test_a_reward_that_weighs_latency_reads_and_records_the_table(tmp_path: Path, table: LatencyTable) -> None:
    reward = {"name": "multi-objective", "accuracy": 0, "resource": "latency"}
    prune = {"ridge": 0.1, "context": WINDOW, "latency_table": str(tmp_path / "given.json")}
    result, said = go(timed(tmp_path, table, prune=prune, reward=reward))
    assert json.loads((result.folder / "allocation.json").read_text())["resource"] == "params"
    assert f"table {table.digest[:12]}" in said
    assert read_table(result.folder / "latency.json").digest == table.digest
    # The objective is the share of the table's time that the allocation saves.
    costs = {curve.shape.kind: curve.costs for curve in table.curves}
    tables = [costs[kind] for _ in range(4) for kind in ("attention", "mlp")]
    for episode in result.found.history:
        time = sum(float(t[k]) for t, k in zip(tables, episode.kept, strict=True))
        saved = 1 - time / sum(float(t[-1]) for t in tables)
        assert list(episode.objectives) == ["perplexity_ratio", "latency_saved"]
        assert episode.objectives["latency_saved"] == pytest.approx(saved)


def test_a_run_that_ends_before_its_search_leaves_no_table(tmp_path: Path, table: LatencyTable) -> None:
    with pytest.raises(KeyboardInterrupt):
        ffgym.run(timed(tmp_path, table), progress=stopping("collect statistics", KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "reward", [{}, {"name": "multi-objective", "resource": "latency", "cost": 0}, {"name": "multi-objective"}]
)
def test_a_table_that_nobody_would_read_is_refused(reward: dict[str, Any]) -> None:
    config = load_config(prune={"latency_table": "here.json"}, reward=reward)
    with pytest.raises(ConfigError, match=r"prune\.latency_table is given, but prune\.resource is 'params'") as raised:
        make_reward(config)
    assert "--resource latency" in str(raised.value.hint)
    assert load_config(prune={"latency_table": "", "resource": "macs"}).prune.latency_table is None


def test_the_environment_takes_it_too(tmp_path: Path, table: LatencyTable) -> None:
    env = make_pruning_env(timed(tmp_path, table))
    assert env.budget.resource == "latency"
    assert env.budget.dense_cost == sum(float(curve.costs[-1]) * 4 for curve in table.curves)
