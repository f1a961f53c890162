"""The bench on a small trained model: equal terms, nothing twice, interruptions without a trace, clear refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from glass_runs import EPISODES, PER_UPDATE, WINDOW, glass_tables
from mlflow_store import client, new_store, runs
from rich.console import Console
from typer.testing import CliRunner

from ffgym import bench as bench_module
from ffgym.bench import bench, read_bench, read_cell
from ffgym.cli import app
from ffgym.envs.pruning_env import PruningEnv
from ffgym.errors import ConfigError, DataError, OutputError, UnknownNameError
from ffgym.plugins import manager
from ffgym.report.bench import BenchTable

AGENTS, SEEDS = ["random", "reinforce", "uniform"], [0, 1]
CELLS = ["random-seed0", "random-seed1", "reinforce-seed0", "reinforce-seed1", "uniform-seed0"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(manager.ENVIRONMENT_VARIABLE, "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def bench_file(folder: Path, *, stem: str = "small", tables: dict[str, Any] | None = None, **spec: Any) -> Path:
    """Write a bench of the small model; ``tables`` change the shared run, ``spec`` the rest."""
    run = glass_tables(folder, **(tables or {}))
    del run["output"]
    content = {"title": "Small", "agents": AGENTS, "seeds": SEEDS, "results": stem, "baseline": "random", "run": run}
    path = folder / f"{stem}.toml"
    path.write_text(tomli_w.dumps({**content, **spec}), encoding="utf-8")
    return path


def call(*files: Path, **options: Any) -> tuple[list[BenchTable], str]:
    console = Console(file=io.StringIO(), width=200)
    tables = bench(list(files), progress=console, **options)
    return tables, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every episode that is measured; with a limit in front, Ctrl-C comes there: ``steps[0] = n``."""
    seen = [10**6]
    step = PruningEnv.step

    def counted(self: PruningEnv, action: np.ndarray) -> Any:
        if len(seen) > seen[0]:
            raise KeyboardInterrupt
        seen.append(len(seen))
        return step(self, action)

    monkeypatch.setattr(PruningEnv, "step", counted)
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, BenchTable, str]]:
    """A bench that ran through, tracked: its file, table and progress."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(manager.ENVIRONMENT_VARIABLE, "")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        new_store(folder / "mlruns")
        file = bench_file(folder, tables={"tracking": {"enabled": True}})
        (table,), said = call(file)
        yield file, table, said


def numbers(folder: Path) -> dict[str, Any]:
    """What the result files say, without what no two runs share."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for result in results.values():
        del result["seconds"]
    return results


# what comes out


def test_one_small_file_per_agent_and_seed_and_heuristics_run_once(finished: Any) -> None:
    file = finished[0]
    results = numbers(file.parent / "small")
    assert list(results) == CELLS
    for name, result in results.items():
        assert f"{result['label']}-seed{result['seed']}" == name
        assert result["report_tokens"] == 1008
        assert result["episodes"] == (1 if result["agent"] == "one-shot" else EPISODES)
        assert result["search_tokens"] == result["episodes"] * 2 * WINDOW
        assert result["dense_loss"] == results["uniform-seed0"]["dense_loss"]
        assert 0.2 <= result["final"]["sparsity"] < 0.21
        assert len(result["digest"]) == 64


def test_incumbents_stand_at_growing_token_marks(finished: Any) -> None:
    for result in numbers(finished[0].parent / "small").values():
        tokens = [mark["tokens"] for mark in result["marks"]]
        assert tokens == sorted(set(tokens))
        assert 1 <= len(tokens) <= bench_module.MARKS
        assert tokens[-1] == result["search_tokens"]
        if result["agent"] != "one-shot":
            assert tokens[0] == PER_UPDATE * 2 * WINDOW
        else:
            assert result["marks"][0]["loss"] == result["final"]["loss"]


def test_table_and_figure_lie_beside_the_file(finished: Any) -> None:
    file, table, _ = finished
    assert {row.label: row.seeds for row in table.rows} == {"random": 2, "reinforce": 2, "uniform": 1}
    text = file.with_suffix(".md").read_text()
    assert all(f"| {row.label} | {row.perplexity:.2f}" in text for row in table.rows)
    assert "1,008 tokens, float32" in text
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_final_quality_is_the_one_a_run_reports(finished: Any, tmp_path: Path) -> None:
    from ffgym import runner
    from ffgym.config import RunConfig

    result = numbers(finished[0].parent / "small")["reinforce-seed1"]
    config = RunConfig.model_validate({**glass_tables(tmp_path, output={"save_model": False}), "seed": 1})
    rows = runner.run(config, progress=Console(quiet=True)).table.rows
    assert np.exp(result["final"]["loss"]) == next(r.perplexity for r in rows if r.label == "reinforce + ridge")
    assert np.exp(result["dense_loss"]) == rows[0].perplexity


def test_one_parent_run_with_a_child_per_cell(finished: Any) -> None:
    root = finished[0].parent / "mlruns"
    parent, *children = runs(root)
    assert parent.info.run_name == "Small"
    assert {run.info.run_name for run in children} == set(CELLS)
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["report/perplexity"] > 1
    history = client(root).get_metric_history(children[0].info.run_id, "search/reward")
    assert [point.step for point in history] == list(range(EPISODES))


def test_progress_says_which_cell_and_how_long_is_left(finished: Any) -> None:
    said = finished[2]
    assert "cell 1 of 5: random, seed 0\n" in said
    assert "cell 2 of 5: random, seed 1, about 0 min left" in said


def test_no_log_is_left_behind(finished: Any) -> None:
    assert list((finished[0].parent / "mlruns" / "bench").iterdir()) == []


# nothing twice


def test_what_is_there_is_not_computed_again(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, table, _ = finished
    monkeypatch.setattr(bench_module.runner, "load_parts", lambda config: pytest.fail("something was loaded"))
    assert call(file)[0] == [table]
    assert call(file, only_report=True)[0] == [table]


def test_a_missing_cell_alone_is_computed(finished: Any, tmp_path: Path, steps: list[int]) -> None:
    file = bench_file(tmp_path)
    results = tmp_path / "small"
    results.mkdir()
    for name in CELLS:
        if name != "reinforce-seed1":
            (results / f"{name}.json").write_bytes((finished[0].parent / "small" / f"{name}.json").read_bytes())
    call(file)
    assert len(steps) - 1 == EPISODES
    assert numbers(results) == numbers(finished[0].parent / "small")


def test_only_report_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module.runner, "load_parts", lambda config: pytest.fail("something was loaded"))
    tables, said = call(bench_file(tmp_path), only_report=True)
    assert tables == []
    assert "Small: no results yet" in said


# interrupted and started again


@pytest.mark.parametrize("after", [0, 3, EPISODES, EPISODES + PER_UPDATE + 1, 4 * EPISODES])
def test_an_interrupted_bench_ends_with_the_same_numbers_and_measures_nothing_twice(
    finished: Any, tmp_path: Path, steps: list[int], after: int
) -> None:
    file = bench_file(tmp_path)
    steps[0] = after
    with pytest.raises(KeyboardInterrupt):
        call(file)
    assert len(numbers(tmp_path / "small")) == after // EPISODES
    steps[0] = 10**6
    call(file)
    assert len(steps) - 1 == 4 * EPISODES + 1
    assert numbers(tmp_path / "small") == numbers(finished[0].parent / "small")


def test_ctrl_c_while_the_report_is_measured_costs_no_episode(
    finished: Any, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench_file(tmp_path, agents=["reinforce"], seeds=[1])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(file)
    call(file)
    assert len(steps) - 1 == EPISODES
    assert numbers(tmp_path / "small") == {
        "reinforce-seed1": numbers(finished[0].parent / "small")["reinforce-seed1"],
    }


def test_a_line_cut_off_by_a_crash_is_measured_again(finished: Any, tmp_path: Path, steps: list[int]) -> None:
    file = bench_file(tmp_path, agents=["reinforce"], seeds=[1])
    steps[0] = 5
    with pytest.raises(KeyboardInterrupt):
        call(file)
    steps[0] = 10**6
    (log,) = (tmp_path / "mlruns" / "bench").iterdir()
    log.write_text(log.read_text()[:-20])
    call(file)
    assert len(steps) - 1 == EPISODES + 1
    assert numbers(tmp_path / "small")["reinforce-seed1"] == numbers(finished[0].parent / "small")["reinforce-seed1"]


def test_a_log_of_another_search_is_refused(tmp_path: Path, steps: list[int]) -> None:
    file = bench_file(tmp_path, agents=["reinforce"], seeds=[1])
    steps[0] = 2
    with pytest.raises(KeyboardInterrupt):
        call(file)
    steps[0] = 10**6
    (log,) = (tmp_path / "mlruns" / "bench").iterdir()
    first, second = log.read_text().splitlines()
    row = json.loads(second)
    row["action"][0] += 0.1
    log.write_text(f"{first}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match="episode 1 of the log is not what this search does") as raised:
        call(file)
    assert raised.value.hint


# variants, many files


def test_variants_change_the_shared_run(tmp_path: Path) -> None:
    variants = {
        "plain": {"agent": {"name": "reinforce"}, "prune": {"calibration": "none"}},
        "flat": {"agent": {"name": "reinforce"}, "prior": {"name": "none"}},
    }
    file = bench_file(tmp_path, agents=["plain", "flat"], seeds=[3], variants=variants)
    plain, flat = read_bench(file).cells
    assert (plain.config.prune.calibration, plain.config.prior.name) == ("none", "mlp-first")
    assert (flat.config.prune.calibration, flat.config.prior.name) == ("ridge", "none")
    assert plain.config.prune.ridge == 0.1  # keys that a variant does not name stay
    assert {plain.config.seed, flat.config.seed} == {3}
    (table,), _ = call(file)
    assert {row.label for row in table.rows} == {"plain", "flat"}


def test_the_command_takes_many_files(finished: Any, tmp_path: Path) -> None:
    other = bench_file(tmp_path, stem="other", title="Other", agents=["uniform"])
    for arguments in (
        ["--config", str(finished[0]), str(other)],
        ["--config", str(finished[0]), "--config", str(other)],
    ):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 0, done.stderr
        assert "# Small" in done.stdout
        assert "# Other" in done.stdout
        assert "cell" not in done.stdout


# bad input: refused before anything is computed


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module.runner, "load_parts", lambda config: pytest.fail("something was loaded"))


@pytest.mark.usefixtures("nothing_runs")
class TestRefusals:
    @pytest.mark.parametrize("key", ["agents", "seeds"])
    def test_nothing_to_run(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(ConfigError, match=f"{key} = "):
            call(bench_file(tmp_path, **{key: []}))

    @pytest.mark.parametrize(("key", "values"), [("agents", ["random", "random"]), ("seeds", [1, 1])])
    def test_the_same_twice(self, tmp_path: Path, key: str, values: list[Any]) -> None:
        with pytest.raises(ConfigError, match=f"{key} = .* twice"):
            call(bench_file(tmp_path, **{key: values}))

    def test_unknown_agent(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match="'reinforc'") as raised:
            call(bench_file(tmp_path, agents=["random", "reinforc"]))
        assert "Did you mean 'reinforce'?" in str(raised.value.hint)

    def test_unknown_option_of_an_agent(self, tmp_path: Path) -> None:
        variants = {"fast": {"agent": {"name": "reinforce", "speed": 9}}}
        with pytest.raises(ConfigError, match=r"'speed' in \[agent\]"):
            call(bench_file(tmp_path, agents=["random", "fast"], variants=variants))

    def test_unknown_key(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="'sedes'") as raised:
            call(bench_file(tmp_path, sedes=[1]))
        assert "'seeds'" in str(raised.value.hint)

    def test_unknown_key_of_the_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"'sparsty' in \[prune\]"):
            call(bench_file(tmp_path, tables={"prune": {"sparsty": 0.2}}))

    def test_mixed_models(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(ConfigError, match=r"compares on one model, these name .*glass, other-model"):
            call(bench_file(tmp_path), bench_file(other, tables={"model": {"name": "other-model"}}))

    def test_fewer_episodes_than_one_update(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"search\.episodes = 3 is less than one update"):
            call(bench_file(tmp_path, tables={"search": {"episodes": 3}}))

    def test_results_of_another_configuration(self, finished: Any, tmp_path: Path) -> None:
        results = str(finished[0].parent / "small")
        with pytest.raises(ConfigError, match="holds the result of another configuration") as raised:
            call(bench_file(tmp_path, results=results, tables={"prune": {"sparsity": 0.3}}))
        assert "another folder" in str(raised.value.hint)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
    def test_a_damaged_result(self, tmp_path: Path, text: str) -> None:
        file = bench_file(tmp_path)
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "random-seed0.json").write_text(text)
        with pytest.raises(DataError, match=r"random-seed0\.json is not a bench result") as raised:
            call(file)
        assert "Delete it" in str(raised.value.hint)

    def test_two_benches_that_would_write_one_file(self, tmp_path: Path) -> None:
        first = bench_file(tmp_path, agents=["random"], results="shared")
        second = bench_file(
            tmp_path, stem="more", agents=["random"], results="shared", tables={"prune": {"sparsity": 0.3}}
        )
        with pytest.raises(ConfigError, match="two benches would write"):
            call(first, second)

    def test_no_such_file_and_no_toml(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.toml"):
            call(tmp_path / "nowhere.toml")
        (tmp_path / "broken.toml").write_text("title =")
        with pytest.raises(ConfigError, match="not valid TOML"):
            call(tmp_path / "broken.toml")

    def test_the_command_says_so_and_exits_1(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["bench", "--config", str(bench_file(tmp_path, agents=[]))])
        assert (done.exit_code, done.stdout) == (1, "")
        assert "error: agents = []" in done.stderr


def test_results_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("a file in the folder's place")
    with pytest.raises(OutputError, match="cannot write"):
        call(bench_file(tmp_path, agents=["uniform"]))


def test_a_full_disk_in_the_middle_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffgym import search

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search, "episode_to_json", full)
    with pytest.raises(OutputError, match="No space left on device"):
        call(bench_file(tmp_path, agents=["random"], seeds=[0]))


def test_a_cell_can_be_read_back(finished: Any) -> None:
    for cell in read_bench(finished[0]).cells:
        assert read_cell(cell).digest == cell.digest


def test_committed_results_belong_to_the_configuration_beside_them() -> None:
    """A key that is added later, or a default that moves, must not orphan what was measured."""
    for file in sorted((Path(__file__).parent.parent / "experiments" / "bench").glob("*.toml")):
        for cell in read_bench(file).cells:
            assert not cell.path.exists() or read_cell(cell).digest == cell.digest, cell.path
