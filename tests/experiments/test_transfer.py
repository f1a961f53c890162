"""The transfer experiment on the small trained model: it measures, goes on where it stopped, its statistics hold."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import made_up_tasks
import numpy as np
import pytest
import tomli_w
from glass_runs import WINDOW, glass_tables
from made_up_episodes import episode
from rich.console import Console

from ffgym.config.toml import read_toml
from ffgym.errors import DataError

QUESTIONS = {"arc_easy": 20, "piqa": 12, "sciq": 10}
FOLDER = Path(__file__).parents[2] / "experiments" / "transfer"


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    made_up_tasks.install(monkeypatch)
    return importlib.import_module("transfer")


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("analysis")


def settings_file(folder: Path, **changes: Any) -> Path:
    tables = glass_tables(folder)
    run = {name: tables[name] for name in ("model", "data", "prune", "search", "tracking", "agent")}
    settings = {
        "title": "tiny",
        "results": "results",
        "seeds": [0, 1],
        "per_search": 3,
        "heuristics": ["uniform", "mlp-first"],
        "text_tokens": 4 * WINDOW,
        "search_examples": 8,
        "report": QUESTIONS,
        "rewards": {
            "perplexity": {"name": "perplexity"},
            "multi": {"name": "multi-objective", "cost": 0.0, "examples": 4},
        },
        "judges": {"kl": {"name": "kl"}},
        "run": run,
        **changes,
    }
    file = folder / "tiny.toml"
    file.write_text(tomli_w.dumps(settings))
    return file


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> Path:
    """The folder of an experiment that ran through."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, drawing():
        patch.syspath_prepend(str(FOLDER))
        made_up_tasks.install(patch)
        importlib.import_module("transfer").run(settings_file(folder), progress=quiet())
    return folder


def copied(whole: Path, folder: Path, *, results: bool = True) -> Path:
    """The settings of the experiment in another folder, with its results or without; what it reads is the same."""
    shutil.copy(whole / "tiny.toml", folder)
    if results:
        shutil.copytree(whole / "results", folder / "results")
    return folder / "tiny.toml"


class TestTheExperiment:
    def test_measures_every_candidate_and_reports(self, whole: Path) -> None:
        rows = [json.loads(line) for line in (whole / "results" / "candidates.jsonl").read_text().splitlines()]
        assert len(rows) == 1 + 2 + 2 * 2 * 3
        assert len({row["label"] for row in rows}) == len(rows)
        assert [row["source"] for row in rows[:3]] == ["dense", "heuristic", "heuristic"]
        assert sum(row["winner"] for row in rows) == 4
        for row in rows:
            assert {task: len(marks) for task, marks in row["right"].items()} == {
                "arc_easy": 20,
                "piqa": 12,
                "sciq": 10,
            }
            assert set(row["rewards"]) == {"perplexity", "multi", "kl"}
            assert row["rewards"]["perplexity"] == pytest.approx(np.exp(row["dense_loss"] - row["loss"]))
            assert row["rewards"]["kl"] == pytest.approx(np.exp(-row["kl"]))
            assert row["seen"] is None or not row["winner"]
        dense = rows[0]
        assert dense["rewards"] == {
            "perplexity": pytest.approx(1, rel=1e-6),
            "multi": pytest.approx(1, rel=1e-6),
            "kl": 1,
        }
        assert all(0.2 <= row["sparsity"] < 0.21 for row in rows[1:])
        assert (whole / "tiny.png").read_bytes().startswith(b"\x89PNG")
        report = (whole / "tiny.md").read_text()
        for part in (
            "# Transfer: tiny",
            "arc_easy 20, piqa 12, sciq 10",
            "| multi |",
            "multi minus perplexity, points",
        ):
            assert part in report
        assert all(f"* {answer}" in report for answer in json.loads((whole / "tiny.json").read_text())["answers"])

    def test_goes_on_where_it_was_interrupted(
        self, transfer: ModuleType, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_episodes: Any
    ) -> None:
        """Ctrl-C within a search, then within the candidates: nothing is measured twice, the result is the same."""
        file = copied(whole, tmp_path, results=False)
        count = iter(range(1000))

        def stop() -> None:
            if next(count) == 5:
                raise KeyboardInterrupt

        before_episodes(stop)
        with pytest.raises(KeyboardInterrupt):
            transfer.run(file, progress=quiet())
        measure, measured = transfer.Bench.measure, []

        def interrupted(self: Any, candidate: Any) -> Any:
            if len(measured) == 3:
                measured.append("stop")
                raise KeyboardInterrupt
            measured.append(candidate.label)
            return measure(self, candidate)

        monkeypatch.setattr(transfer.Bench, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transfer.run(file, progress=quiet())
        with (tmp_path / "results" / "candidates.jsonl").open("a") as lines:
            lines.write('{"label": "half a li')
        transfer.run(file, progress=quiet())
        assert len(measured) - 1 == len(set(measured)) - 1, "no candidate twice"

        def content(folder: Path) -> list[Any]:
            rows = [json.loads(line) for line in (folder / "results" / "candidates.jsonl").read_text().splitlines()]
            return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

        assert content(tmp_path) == content(whole)
        assert (tmp_path / "tiny.md").read_text() == (whole / "tiny.md").read_text()

    def test_the_report_alone_computes_nothing(
        self, transfer: ModuleType, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = copied(whole, tmp_path)
        monkeypatch.setattr(transfer, "Bench", lambda *_: pytest.fail("the model was loaded"))
        transfer.run(file, only_report=True, progress=quiet())
        assert (tmp_path / "tiny.md").read_text() == (whole / "tiny.md").read_text()

    def test_results_of_other_settings_are_refused(self, transfer: ModuleType, whole: Path, tmp_path: Path) -> None:
        copied(whole, tmp_path)
        with pytest.raises(DataError, match="results of other settings"):
            transfer.run(settings_file(tmp_path, seeds=[1]), progress=quiet())

    def test_the_committed_settings_are_valid(self, transfer: ModuleType) -> None:
        for file in FOLDER.glob("*.toml"):
            assert transfer.read_settings(file).rewards
            assert read_toml(file)


class TestSpread:
    def test_from_worst_to_best_without_repeats(self, transfer: ModuleType) -> None:
        losses = [3.0, 1.0, 2.0, 5.0, 4.0, 1.0]
        history = [
            transfer.Episode(**{**vars(episode(i, 0, 0.5)), "loss": loss, "kept": (i % 5,)})
            for i, loss in enumerate(losses)
        ]
        assert [e.index for e in transfer.spread(history, 3, without=[])] == [1, 0, 3]
        assert [e.index for e in transfer.spread(history, 9, without=[(0,), (3,)])] == [1, 2, 4]
        failed = [replace(e, failed=True) for e in history]
        assert transfer.spread(failed, 3, without=[]) == []


def made_up_rows(strength: float, *, candidates: int = 24, questions: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Candidates whose true accuracy follows the reward ``good`` with this strength, and not the reward ``noise``."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(candidates + 1):
        quality = rng.normal()
        chance = 0.5 + 0.12 * (strength * quality + np.sqrt(1 - strength**2) * rng.normal())
        right = {task: "".join(rng.choice(["0", "1"], questions, p=[1 - chance, chance])) for task in ("a", "b")}
        source = "dense" if index == 0 else ("heuristic" if index < 5 else "perplexity")
        rows.append(
            {
                "label": str(index),
                "source": source,
                "seed": 0,
                "winner": index in (5, 6),
                "kept": [index],
                "seen": [3.0 - quality / 10, 3.0],
                "loss": 3.0,
                "dense_loss": 3.0,
                "rewards": {"good": quality, "noise": rng.normal()},
                "right": right,
                "tokens": 10,
            }
        )
    rows[6]["source"] = "other"
    return rows


class TestStatistics:
    def test_correlations_are_scipys(self, analysis: ModuleType) -> None:
        from scipy import stats

        rng = np.random.default_rng(0)
        x, y = rng.normal(size=30), rng.integers(0, 6, 30).astype(float)
        assert analysis.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert analysis.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert np.isnan(analysis.pearson(x, np.ones(30)))
        rows = analysis.spearman(np.stack([x, y]), np.stack([y, y]))
        assert rows == pytest.approx(np.array([analysis.spearman(x, y), 1.0])), "row by row"

    def test_a_strong_correlation_is_found_and_none_is_not(self, analysis: ModuleType) -> None:
        every = analysis.analyse(made_up_rows(0.9), "t").populations[0]
        good, noise, seen = every.correlations
        assert good.spearman.is_clear
        assert good.spearman.low < good.spearman.value < good.spearman.high
        assert good.spearman.value > 0.6
        assert not noise.spearman.is_clear
        assert seen.spearman.value == pytest.approx(good.spearman.value), "the same order, seen or measured again"
        assert every.differences["noise"].is_clear
        assert every.differences["noise"].value == pytest.approx(noise.spearman.value - good.spearman.value)
        assert 0.8 < every.ceiling <= 1

    def test_the_interval_covers_the_truth_about_as_often_as_it_says(self, analysis: ModuleType) -> None:
        hits = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            x = rng.normal(size=40)
            y = 0.6 * x + 0.8 * rng.normal(size=40)
            found = analysis.bootstrap([x, y], analysis.pearson)
            hits += found.low <= 0.6 <= found.high
        assert 33 <= hits <= 40

    def test_few_questions_lower_the_ceiling(self, analysis: ModuleType) -> None:
        ceilings = [
            analysis.population("x", made_up_rows(0.9, questions=count)[1:]).ceiling for count in (12, 60, 1000)
        ]
        assert ceilings[0] < ceilings[1] < ceilings[2]
        assert ceilings[2] > 0.97

    def test_standard_errors_are_binomial(self, analysis: ModuleType) -> None:
        right = {"a": np.array([[True] * 25 + [False] * 75]), "b": np.array([[True] * 50 + [False] * 50])}
        expected = np.sqrt(0.25 * 0.75 / 100 + 0.25 / 100) / 2
        assert analysis.standard_errors(right)[0] == pytest.approx(expected)
        same = {"a": np.array([[True, False, True]] * 2)}
        assert analysis.paired_error(same) == 0, "equal answers have no noise between them"

    def test_winners_are_compared_on_the_same_questions(self, analysis: ModuleType) -> None:
        rows = made_up_rows(0.9)
        for row, marks in ((rows[5], "0101" * 50), (rows[6], "0111" * 50)):
            row["right"] = {"a": marks, "b": "01" * 100}
        (pair,) = analysis.analyse(rows, "t").winners
        assert (pair.reward, pair.baseline, pair.seeds) == ("other", "perplexity", 1)
        assert pair.by_task["a"].value == pytest.approx(0.25)
        assert pair.by_task["b"].value == 0
        assert pair.mean.value == pytest.approx(0.125)
        assert pair.mean.is_clear
        assert any("other finds the more accurate model" in answer for answer in analysis.analyse(rows, "t").answers)

    def test_answers_are_plain(self, analysis: ModuleType) -> None:
        said = " ".join(analysis.analyse(made_up_rows(0.9), "t").answers)
        assert "it carries over" in said
        assert "it predicts accuracy worse" in said
        said = " ".join(analysis.analyse(made_up_rows(0.0, candidates=10, questions=30), "t").answers)
        assert "no correlation that can be told from none" in said

    def test_what_does_not_vary_is_said_and_not_computed(self, analysis: ModuleType) -> None:
        rows = made_up_rows(0.9, candidates=8)
        for row in rows:
            row["right"] = {"a": "01", "b": "10"}
        found = analysis.analyse(rows, "t")
        assert found.populations[0].correlations[0].spearman.value is None
        assert "nothing can be said" in found.answers[0]
        assert "—" in analysis.markdown(found)
