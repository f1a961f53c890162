"""``ffgym compare`` and what runs are read back as: on folders that are written by hand, no model anywhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import new_store
from stored_runs import LOSSES, write_run
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.config.toml import load_config, to_toml
from ffgym.pipeline.artifacts import write_table
from ffgym.pipeline.stored import read_table
from ffgym.prepare.configured import resolve_agent
from ffgym.report.table import Cost
from ffgym.tracking.store import FOLDER_TAG
from ffgym.tracking.tracker import Result, Tracker


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    return {name: write_run(tmp_path / "runs", name) for name in LOSSES}


def test_a_table_is_read_back_as_it_was_written(runs: dict[str, Path]) -> None:
    table = read_table(runs["one"])
    assert (table.header, table.windows) == ("how it was measured", "abc")
    before = (runs["one"] / "report.md").read_text()
    write_table(runs["one"], table)
    assert (runs["one"] / "report.md").read_text() == before
    assert read_table(runs["one"]) == table
    assert read_table(runs["broken"]).result.perplexity == math.inf


def test_a_cost_whose_resource_is_gone_stays_in_the_table(runs: dict[str, Path]) -> None:
    table = read_table(runs["one"])
    joules = Cost("joules", "J/token", 3, "3 J")
    rows = tuple(replace(row, costs=(*row.costs, joules)) for row in table.rows)
    write_table(runs["one"], replace(table, rows=rows))
    again = read_table(runs["one"])
    assert [row.costs[-1] for row in again.rows] == [joules] * 3
    assert "3 J" in again.layout().markdown()


@pytest.mark.usefixtures("drawn")
def test_runs_are_compared_window_by_window(runs: dict[str, Path], tmp_path: Path) -> None:
    done = call(runs["one"], runs["better"], runs["tied"], "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "reference" in lines["one"]
    assert "-0.097 ± 0.014" in lines["better"]
    assert "+0.017 ± 0.259 tie" in lines["tied"]
    assert "In every row: params 80.0 M, sparsity 20.0%, agent reinforce" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.partition("Written to")[0].splitlines())) <= 80
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"comparison.md", "differences.png"}
    assert "| better |" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_comparison_without_differences_leaves_no_picture_of_an_earlier_one(runs: dict[str, Path]) -> None:
    for other, drawn in (("better", True), ("broken", False)):
        assert ("differences.png" in call(runs["one"], runs[other]).stdout) == drawn
        assert Path("comparison/differences.png").exists() == drawn


def test_json_has_the_differences(runs: dict[str, Path], tmp_path: Path) -> None:
    done = call(runs["one"], runs["better"], "--json", "--output", tmp_path / "out")
    one, better = json.loads(done.stdout)["runs"]
    assert (one["run"], one["difference"]) == ("one", None)
    assert better["difference"] == pytest.approx(-0.29 / 3)
    assert better["difference_margin"] == pytest.approx(0.0143, abs=1e-4)


def test_what_the_runs_were_told_differently_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path, "other")
    (other / "config.toml").write_text(
        "[agent]\nname = 'random'\nspread = 0.1\n[search]\nepisodes = 24\n[recover]\nmethod = 'lora'\nrank = 8\n"
    )
    done = call(runs["one"], runs["better"], other, "--output", tmp_path / "out")
    said = (
        'other differs from one: agent.name = "random" (not "reinforce"), search.episodes = 24 (not 48), '
        'recover.method = "lora" (not "none").'
    )
    assert said in " ".join(done.stdout.split())
    assert "better differs" not in done.stdout


def test_rules_have_their_names_and_no_settings_that_nobody_chose(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, rule in (("better", "flap"), ("tied", "fisher")):
        (runs[name] / "config.toml").write_text(to_toml(resolve_agent(load_config(agent={"name": rule}))))
    done = call(runs["one"], runs["better"], runs["tied"], "--json", "--output", tmp_path / "out")
    assert [run["agent"] for run in json.loads(done.stdout)["runs"]] == ["reinforce", "flap", "fisher"]
    assert "search.episodes" not in (tmp_path / "out" / "comparison.md").read_text()
    said = " ".join(call(runs["better"], runs["tied"], "--output", tmp_path / "out").stdout.split())
    assert 'tied differs from better: prior.name = "fisher" (not "flap").' in said


def test_a_range_is_compared_by_one_point_and_it_is_said_which(runs: dict[str, Path], tmp_path: Path) -> None:
    (runs["better"] / "config.toml").write_text("[prune]\nsparsity = '0.1:0.5'\n")
    said = " ".join(call(runs["one"], runs["better"], "--output", tmp_path / "out").stdout.split())
    assert "better has a range of budgets: its point at 30% stands here." in said


def test_a_point_of_a_range_is_refused_with_the_folder_to_name(runs: dict[str, Path], tmp_path: Path) -> None:
    with Tracker(new_store(tmp_path / "store"), "ffgym", "range") as tracker:
        tracker.set_tags({FOLDER_TAG: str(runs["better"])})
        tracker.log_child("sparsity 20.0%", {}, Result(30.0, 20.0))
    done = call(runs["one"], "range: sparsity 20.0%", "--root", tmp_path / "store")
    said = " ".join(failure(done).split())
    assert "is a point of the run range, and has no folder itself" in said
    assert f"Name {runs['better']}" in said


def test_a_destroyed_run_is_called_so(runs: dict[str, Path], tmp_path: Path) -> None:
    done = call(runs["one"], runs["broken"], "--output", tmp_path / "out")
    assert "broken: The pruned model is destroyed" in " ".join(done.stdout.split())
    (runs["broken"] / "allocation.json").write_text('{"kept": [1, 2]}')
    again = CliRunner().invoke(app, ["run", "--resume", str(runs["broken"])])
    assert "Warning: The pruned model is destroyed" in " ".join(again.stdout.split())


def test_two_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    twin = write_run(tmp_path / "others", "one")
    done = call(runs["one"], twin, "--output", tmp_path / "out")
    assert "others/one" in done.stdout
    assert "runs/one" in done.stdout
    third = write_run(tmp_path / "more" / "runs", "one")
    (third / "config.toml").write_text("[search]\nepisodes = 24\n")
    said = " ".join(call(runs["one"], third, "--output", tmp_path / "out").stdout.split())
    assert f"more/runs/one differs from {tmp_path.name}/runs/one" in said


def failure(done: Any) -> str:
    assert done.exit_code == 1, done.output
    return str(done.stderr)


def test_runs_without_shared_windows_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path, "other", windows="xyz", report_tokens=4096)
    said = failure(call(runs["one"], other))
    assert "share no windows of text: 16,384 tokens of demo:wiki" in said
    assert "4,096 tokens of demo:wiki" in said


def test_an_unfinished_run_is_refused_with_the_command_that_goes_on(runs: dict[str, Path]) -> None:
    (runs["better"] / "report.json").unlink()
    said = failure(call(runs["one"], runs["better"]))
    assert f"the run in {runs['better']} is not finished" in said
    assert f"ffgym run --resume {runs['better']}" in said


@pytest.mark.parametrize(
    "damage",
    ["not json", "[]", '{"rows": [], "header": ""}', '{"windows": "", "measured": "", "losses": {"dense": [1.0]}}'],
)
def test_a_damaged_table_and_one_of_an_earlier_version_are_named(runs: dict[str, Path], damage: str) -> None:
    (runs["better"] / "losses.json").write_text(damage)
    said = failure(call(runs["one"], runs["better"]))
    assert "better/losses.json is no table of a run" in said
    assert "Delete report.json in that folder; `ffgym run --resume FOLDER` then makes all results again" in said


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        (r'"perplexity":[\d.]+', '"perplexity":"x"'),
        (r'"perplexity":[\d.]+', '"perplexity":0'),
        (r'"value":[\d.]+', '"value":null'),
        (r'"value":[\d.]+', '"value":"NaN"'),
        (r'"key":"params"', '"key":"macs"'),
        (r'"losses":\[[^]]+\]', '"losses":[]'),
        (r'("losses":\[[^],]+),[^]]+\]', r"\1]"),
    ],
)
def test_a_value_that_no_table_has_is_named(runs: dict[str, Path], pattern: str, damage: str) -> None:
    path = runs["better"] / "losses.json"
    path.write_text(re.sub(pattern, damage, path.read_text(), count=1))
    assert "better/losses.json is no table of a run" in failure(call(runs["one"], runs["better"]))


@pytest.mark.parametrize("file", ["losses.json", "allocation.json"])
def test_the_results_of_a_finished_run_that_are_damaged_are_named(runs: dict[str, Path], file: str) -> None:
    (runs["one"] / file).write_text("[" * 3000)
    done = CliRunner().invoke(app, ["run", "--resume", str(runs["one"]), "--json"])
    assert f"one/{file} is no" in failure(done)


def test_a_folder_of_something_else_one_run_twice_and_one_run_alone_are_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    assert "has no config.toml" in failure(call(runs["one"], tmp_path))
    said = failure(call(runs["one"], "runs/noe"))
    assert "'runs/noe' is no folder of a run, and there is no MLflow store" in said
    assert "Check the path" in said
    (runs["better"] / "config.json").touch()
    assert "better is the folder of a saved model" in failure(call(runs["one"], runs["better"]))
    assert "is named twice" in failure(call(runs["one"], runs["one"]))
    alone = call(runs["one"])
    assert (alone.exit_code, "name at least two runs" in alone.stderr) == (2, True)
    assert not (tmp_path / "comparison").exists(), "a comparison that is refused leaves no folder"
