"""Whole runs on rewards beyond perplexity: what they write, track and repeat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import made_up_tasks
import numpy as np
import pytest
from glass_runs import WINDOW, Finished, finish, glass_config, untimed
from mlflow_store import client, new_store, runs

from ffgym.config.tables import RunConfig
from ffgym.pipeline.stored import read_table

pytestmark = pytest.mark.usefixtures("only_builtins")


@pytest.fixture(scope="module")
def traded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("traded")
    with pytest.MonkeyPatch.context() as patch:
        made_up_tasks.install(patch)
        new_store(folder / "mlruns")
        reward = {"name": "multi-objective", "examples": 8, "resource": "kv"}
        yield finish(glass_config(folder, tracking={"enabled": True}, reward=reward, search={"episodes": 24}))


def test_its_verdict_says_that_it_is_about_perplexity_alone(traded: Finished) -> None:
    (verdict,) = traded.result.table.verdict
    assert verdict.startswith("By perplexity alone, ")
    assert read_table(traded.folder).verdict == [verdict]


def test_every_episode_is_logged_with_its_objectives(traded: Finished) -> None:
    (run,) = runs(traded.root)
    for name in ("perplexity_ratio", "accuracy", "kv_saved"):
        history = client(traded.root).get_metric_history(run.info.run_id, f"search/objective/{name}")
        values = [episode.objectives[name] for episode in traded.result.found.history]
        assert [point.value for point in history] == (values if len(set(values)) > 1 else [])  # constants are no curves


def test_task_examples_count_as_tokens(traded: Finished) -> None:
    history = traded.result.found.history
    assert all(episode.tokens > 2 * WINDOW for episode in history)
    assert len(history) < 24, "the budget is in tokens"


def test_it_repeats_bit_for_bit(traded: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_tasks.install(monkeypatch)
    tables = traded.config.model_dump()
    tables["output"] |= {"dir": str(tmp_path / "out")}
    tables["tracking"] |= {"enabled": False}
    again = finish(RunConfig.model_validate(tables))
    assert untimed(again.folder / "episodes.jsonl") == untimed(traded.folder / "episodes.jsonl")
    assert (again.folder / "allocation.json").read_text() == (traded.folder / "allocation.json").read_text()


def test_a_heuristic_that_earns_more_than_the_result_is_named(tmp_path: Path) -> None:
    """Perplexity does not show it: the search stays beside its prior, which saves nothing of the KV cache."""
    reward = {"name": "multi-objective", "accuracy": 0.0, "cost": 9.0, "resource": "kv"}
    near = {"name": "random", "spread": 0.001}
    table = finish(glass_config(tmp_path, reward=reward, agent=near)).result.table
    dense, uniform, found = table.rows[0], table.rows[1], table.result
    ours, theirs = (
        np.exp(np.subtract(dense.losses, row.losses)).mean() / 10 + 0.9 * (1 - row.values["kv"] / dense.values["kv"])
        for row in (found, uniform)
    )
    assert found.note == (
        f"by its reward, uniform + ridge ({theirs:.2f}) is ahead of it ({ours:.2f}): start there with --prior uniform"
    )


def test_what_heuristics_earn_is_not_guessed_where_accuracy_counts(traded: Finished) -> None:
    assert not any("by its reward" in row.note for row in traded.result.table.rows)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_divergence_is_searched_on(tmp_path: Path, direction: str) -> None:
    agent = {"name": "reinforce", "slopes": True}
    done = finish(glass_config(tmp_path, agent=agent, reward={"name": "kl", "direction": direction}))
    history = done.result.found.history
    assert all(0 < episode.reward < 1 for episode in history)
    assert any(history[0].slopes), "reinforce follows the divergence"
