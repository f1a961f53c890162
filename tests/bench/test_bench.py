"""The bench on a small trained model: equal terms, nothing twice, interruptions without a trace, clear refusals."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import glass_runs
import numpy as np
import pytest
import torch
from filelock import FileLock
from glass_runs import EPISODES, NO_MODEL, PER_UPDATE, WINDOW, glass_tables, stopping
from mlflow_store import client, new_store, runs
from processes import PATIENCE, interrupted, lines
from rich.console import Console
from typer.testing import CliRunner

from ffgym.bench import cell as cell_module
from ffgym.bench.bench import bench
from ffgym.bench.cell import CELL_RESULT, Job
from ffgym.bench.file import read_bench
from ffgym.bench.page import bench_page
from ffgym.bench.queue import CellQueue
from ffgym.bench.table import BenchTable
from ffgym.cli import app
from ffgym.errors import ConfigError, DataError, ModelError, OutputError, WorkerError
from ffgym.pipeline.stored import stored_run
from ffgym.plugins.discovery import ENVIRONMENT_VARIABLE
from ffgym.prepare import configured
from ffgym.report.progress import Reporter

pytestmark = pytest.mark.usefixtures("only_builtins")

AGENTS, SEEDS = ["random", "reinforce", "uniform"], [0, 1]
CELLS = ["random-seed0", "random-seed1", "reinforce-seed0", "reinforce-seed1", "uniform-seed0"]


bench_file = partial(glass_runs.bench_file, agents=AGENTS, seeds=SEEDS)


def call(*files: Path, **options: Any) -> tuple[list[BenchTable], str]:
    console = Console(file=io.StringIO(), width=200)
    tables = bench(list(files), progress=console, **options)
    return tables, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> tuple[Path, BenchTable, str]:
    """A bench that ran through, tracked and drawn: its file, table and progress."""
    folder = tmp_path_factory.mktemp("finished")
    new_store(folder / "mlruns")
    file = bench_file(folder, tables={"tracking": {"enabled": True}})
    with drawing():
        (table,), said = call(file)
    return file, table, said


def numbers(folder: Path) -> dict[str, Any]:
    """What the result files say, without what no two runs share."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for result in results.values():
        del result["seconds"]
    return results


# what comes out


def test_another_report_text_is_measured_as_the_bench_measures_its_own(
    finished: tuple[Path, BenchTable, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table, _ = finished
    script = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "bench" / "second_text.py"))
    text, output = str(read_bench(file).cells[0].config.data.report), tmp_path / "again.md"
    assert script["main"]([text, str(file), "--output", str(output)]) == 0
    assert output.read_text() == script["shown"](replace(table, files=())) + "\n"
    assert "| tokens |" not in output.read_text()
    losses = json.loads(output.with_suffix(".json").read_text())[file.stem]
    own = {name: result["final"]["losses"] for name, result in numbers(file.parent / file.stem).items()}
    assert losses == {name: pytest.approx(each, abs=1e-6) for name, each in own.items()}

    assert script["main"]([text, str(tmp_path / "none.toml"), "--output", str(output)]) == 1
    assert "none.toml" in capsys.readouterr().err


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
        assert result["settings"]["agent"]["name"] == result["agent"]


def test_incumbents_stand_at_growing_token_marks(finished: Any) -> None:
    for result in numbers(finished[0].parent / "small").values():
        tokens = [mark["tokens"] for mark in result["marks"]]
        assert tokens == sorted(set(tokens))
        assert 1 <= len(tokens) <= 6
        assert tokens[-1] == result["search_tokens"]
        if result["agent"] != "one-shot":
            assert tokens[0] == PER_UPDATE * 2 * WINDOW
        else:
            assert result["marks"][0]["loss"] == result["final"]["loss"]


def test_table_and_figure_lie_beside_the_file(finished: Any) -> None:
    file, table, _ = finished
    assert {row.label: row.seeds for row in table.rows} == {"random": 2, "reinforce": 2, "uniform": 1}
    text = file.with_suffix(".md").read_text()
    assert all(f"| {row.label} | {row.perplexity} |" in text for row in table.rows)
    assert "1,008 tokens in windows of" in text
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_final_quality_is_the_one_a_run_reports(finished: Any, tmp_path: Path) -> None:
    import ffgym
    from ffgym.config.tables import RunConfig

    result = numbers(finished[0].parent / "small")["reinforce-seed1"]
    config = RunConfig.model_validate({**glass_tables(tmp_path, output={"save_model": False}), "seed": 1})
    rows = ffgym.run(config, progress=Console(quiet=True)).table.rows
    assert math.exp(result["final"]["loss"]) == next(r.perplexity for r in rows if r.label == "reinforce + ridge")
    assert math.exp(result["dense_loss"]) == rows[0].perplexity


def cell_of(run: Any) -> str:
    """``Small: random, seed 0`` is the cell ``random-seed0``."""
    return str(run.info.run_name.removeprefix("Small: ").replace(", seed ", "-seed"))


def test_one_parent_run_with_a_child_per_cell(finished: Any) -> None:
    root = finished[0].parent / "mlruns"
    parent, *children = runs(root)
    assert parent.info.run_name == "Small"
    assert {cell_of(run) for run in children} == set(CELLS)
    assert parent.data.tags["mlflow.note.content"] == finished[0].with_suffix(".md").read_text()
    assert parent.data.params["agent"] == ", ".join(AGENTS)
    assert parent.data.params["sparsity"] == children[0].data.params["sparsity"]
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.metrics["result/ratio_to_dense"] > 0
    history = client(root).get_metric_history(children[0].info.run_id, "search/reward")
    assert [point.step for point in history] == list(range(EPISODES))
    assert {entry.path for entry in client(root).list_artifacts(parent.info.run_id)} == {
        "config.toml", "small.md", "small.png"
    }  # fmt: skip


def test_a_cell_is_not_compared_as_if_its_folder_were_lost(finished: Any) -> None:
    root = finished[0].parent / "mlruns"
    with pytest.raises(OutputError, match="is a cell of the bench Small, and has no folder") as caught:
        stored_run("Small: random, seed 0", root, "ffgym")
    assert "ffgym bench FILE --report" in (caught.value.hint or "")


def test_a_childs_run_holds_what_the_table_and_the_picture_are_made_of(finished: Any) -> None:
    root, results = finished[0].parent / "mlruns", numbers(finished[0].parent / "small")
    for run in runs(root)[1:]:
        name, result = cell_of(run), results[cell_of(run)]
        assert f"{name}.json" in {entry.path for entry in client(root).list_artifacts(run.info.run_id)}
        metrics = run.data.metrics
        assert metrics["result/perplexity"] == pytest.approx(math.exp(result["final"]["loss"]))
        assert metrics["result/nats_above_dense"] == pytest.approx(result["final"]["loss"] - result["dense_loss"])
        assert metrics["result/search_tokens"] == result["search_tokens"]
        assert run.data.tags[f"plugin.agent.{result['agent']}"].startswith("ffgym ")
        assert {kind.value for data in run.inputs.dataset_inputs for kind in data.tags} == {
            "calibration", "search", "report"
        }  # fmt: skip
        history = client(root).get_metric_history(run.info.run_id, "search/incumbent")
        assert [point.step for point in history] == [mark["tokens"] for mark in result["marks"]]


def test_progress_says_which_cell_and_how_long_is_left(finished: Any) -> None:
    said = finished[2]
    assert "cell 1 of 5: random, seed 0\n" in said
    assert re.search(r"cell 4 of 5: random, seed 1, \d+:\d\d left in all\n", said)


def test_no_log_is_left_behind(finished: Any) -> None:
    assert list((finished[0].parent / "mlruns" / "bench").iterdir()) == []


def test_fewer_marks_keep_the_first_and_the_last(tmp_path: Path) -> None:
    glass = glass_tables(tmp_path)
    longer = {"search": {**glass["search"], "episodes": 8 * PER_UPDATE}}
    update = PER_UPDATE * 2 * WINDOW
    noted = {}
    for marks in (2, 3, 8):
        call(bench_file(tmp_path, stem=f"marks-{marks}", agents=["random"], seeds=[0], marks=marks, tables=longer))
        result = numbers(tmp_path / f"marks-{marks}")["random-seed0"]
        noted[marks] = {mark["tokens"]: mark["loss"] for mark in result["marks"]}
    assert list(noted[2]) == [update, 8 * update]
    assert list(noted[3]) == [update, 3 * update, 8 * update]  # the first update past the geometric mean, 2.8
    assert list(noted[8]) == [update, 2 * update, 3 * update, 4 * update, 5 * update, 6 * update, 8 * update]
    assert noted[2].items() <= noted[3].items() <= noted[8].items()


# nothing twice


def test_what_is_there_is_not_computed_again(finished: Any) -> None:
    file, table, _ = finished
    for options in ({}, {"only_report": True}):
        tables, said = call(file, **options)
        assert tables == [table]
        assert "done in" not in said, "no stage was gone through"


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


def test_only_report_computes_nothing(tmp_path: Path) -> None:
    tables, said = call(bench_file(tmp_path, tables={"model": NO_MODEL}), only_report=True)
    assert tables == []
    assert "Small: no results yet" in said


def test_an_unfinished_bench_says_which_seeds_are_missing(finished: Any, tmp_path: Path) -> None:
    file = bench_file(tmp_path)
    shutil.copytree(finished[0].parent / "small", tmp_path / "small")
    for name in ("random-seed1", "reinforce-seed0", "reinforce-seed1"):
        (tmp_path / "small" / f"{name}.json").unlink()
    (table,), _ = call(file, only_report=True)
    said = "Not finished: 2 of 5 cells; missing seeds: random 1 of 2, reinforce 2 of 2. Report split of "
    assert table.header.startswith(said)
    assert said in file.with_suffix(".md").read_text()
    assert table.header in bench_page(file).summary
    assert "Not finished" not in finished[1].header


def test_the_same_work_under_two_labels_or_in_two_files_is_done_once(tmp_path: Path, steps: list[int]) -> None:
    searched, harder = {"searched": {"agent": {"name": "reinforce"}}}, {"harder": {"prune": {"sparsity": 0.3}}}
    first = bench_file(tmp_path, agents=["reinforce", "searched"], seeds=[0], variants=searched)
    second = bench_file(tmp_path, stem="more", agents=["harder", "reinforce"], seeds=[0, 1], variants=harder, marks=2)
    call(first, second)
    assert len(steps) - 1 == 4 * EPISODES
    one, same = numbers(tmp_path / "small").values()
    assert (one.pop("label"), same.pop("label")) == ("reinforce", "searched")
    assert one == same
    elsewhere = numbers(tmp_path / "more")["reinforce-seed0"]
    assert elsewhere.pop("label") == "reinforce"
    assert elsewhere == one


def test_marks_that_another_file_lacks_are_computed(tmp_path: Path, steps: list[int]) -> None:
    call(bench_file(tmp_path, agents=["random"], seeds=[0], marks=2))
    call(
        bench_file(tmp_path, agents=["random"], seeds=[0], marks=2), bench_file(tmp_path, stem="b", marks=6, seeds=[0])
    )
    assert len(steps) - 1 == 3 * EPISODES + 1


def test_files_that_each_ask_for_more_than_the_other_share_one_cell(tmp_path: Path, steps: list[int]) -> None:
    more_marks = bench_file(tmp_path, agents=["reinforce"], seeds=[0], marks=6)
    plain = bench_file(tmp_path, stem="plain", agents=["reinforce"], seeds=[0], marks=2, plain=True)
    (_, table), _ = call(more_marks, plain)
    assert len(steps) - 1 == EPISODES
    (one,), (other,) = numbers(tmp_path / "small").values(), numbers(tmp_path / "plain").values()
    assert one == other
    assert one["asked_marks"] == 6
    assert one["final"]["plain_loss"] != one["final"]["loss"]
    assert table.rows[0].plain.value == pytest.approx(np.exp(one["final"]["plain_loss"]))
    call(more_marks, plain)
    assert len(steps) - 1 == EPISODES


def test_a_single_cell_left_of_several_workers_keeps_their_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        call(bench_file(tmp_path, agents=["uniform"]), workers=2)
        assert numbers(tmp_path / "small")["uniform-seed0"]["threads"] == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_cluster_is_named_where_one_process_computes_all_cells(tmp_path: Path) -> None:
    said = [call(bench_file(tmp_path, agents=["uniform"]), ray_address="auto")[1] for _ in range(2)]
    assert ["the Ray cluster at auto is not used" in each for each in said] == [True, False], "then nothing is missing"


# who comes next


def order(*benches: Any, workers: tuple[int, ...] = (0,)) -> list[str]:
    """What free workers are handed, taking turns, and each done before its next."""
    cells = [cell for each in benches for cell in each.cells]
    queue = CellQueue(cells, cells, {each.file: None for each in benches}, Reporter(Console(quiet=True)))
    handed: list[str] = []
    while len(handed) < len(cells):
        for worker in workers:
            job = queue.take(worker)
            assert isinstance(job, Job)
            handed.append(f"{job.cell.label}{job.cell.seed}")
            queue.done(worker)
            if len(handed) == len(cells):
                break
    assert queue.take(0) is None
    return handed


def test_the_first_seed_of_everything_comes_first_and_prepared_models_are_kept(tmp_path: Path) -> None:
    variants = {
        "a": {"agent": {"name": "random"}},
        "b": {"agent": {"name": "random"}, "criterion": {"name": "magnitude"}},
        "c": {"agent": {"name": "evolution"}},
    }
    one = read_bench(bench_file(tmp_path, agents=["a", "b", "c"], seeds=[5, 1], variants=variants))
    two = read_bench(bench_file(tmp_path, stem="two", agents=["ppo", "uniform"], seeds=[7, 8]))
    first = ["a5", "c5", "ppo7", "uniform7", "b5"]
    assert order(one, two) == [*first, "b1", "a1", "c1", "ppo8"]
    # The second worker takes what the first has not prepared.
    assert order(one, two, workers=(0, 1)) == ["a5", "b5", "c5", "ppo7", "uniform7", "a1", "c1", "ppo8", "b1"]


def test_a_bench_that_goes_on_after_its_rules_finds_the_model_that_it_has_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics that a rule asks for are a part of what is prepared."""
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1G")
    file = bench_file(tmp_path, agents=["random", "flap"], seeds=[0])
    call(file)
    (tmp_path / "small" / "random-seed0.json").unlink()
    assert "opened what was prepared before" in call(file)[1]


def test_further_seeds_of_some_agents_come_last(tmp_path: Path) -> None:
    file = bench_file(tmp_path, agents=["ppo", "random"], seeds=[5, 1], more_seeds={"random": [3]})
    assert order(read_bench(file)) == ["ppo5", "random5", "ppo1", "random1", "random3"]


# several at a time


@pytest.mark.slow
def test_cells_computed_side_by_side_are_the_same(finished: Any, tmp_path: Path, steps: list[int]) -> None:
    new_store(tmp_path / "mlruns")
    file = bench_file(tmp_path, tables={"tracking": {"enabled": True}})
    (table,), said = call(file, workers=2)
    assert len(steps) == 1  # nothing in this process
    assert numbers(tmp_path / "small") == numbers(finished[0].parent / "small")
    assert [(row.label, row.perplexity) for row in table.rows] == [(r.label, r.perplexity) for r in finished[1].rows]
    assert re.search(r"\[[12]\] collect statistics, order and factorise: done in", said)
    parent, *children = runs(tmp_path / "mlruns")
    assert {cell_of(run) for run in children} == set(CELLS)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}


@pytest.mark.slow
def test_a_bench_that_is_killed_loses_the_episodes_in_flight_only(
    tmp_path: Path, steps: list[int], patient: Callable[[int], dict[str, str]]
) -> None:
    terms: dict[str, Any] = {"agents": ["random"], "tables": {"reward": {"name": "patient"}}, "marks": 2}
    file = bench_file(tmp_path, **terms)
    logs = tmp_path / "mlruns" / "bench"

    def kept() -> list[int]:
        return [lines(path) for path in logs.glob("*.jsonl")]

    command = [sys.executable, "-m", "ffgym", "bench", str(file), "--jobs", "2"]
    interrupted(
        command,
        signal.SIGKILL,
        lambda: len(kept()) == 2 and min(kept()) >= PER_UPDATE,
        env=patient(PER_UPDATE + 2),
    )
    for lock in logs.glob("*.lock"):  # until the workers have noticed
        with FileLock(lock, timeout=PATIENCE):
            pass
    left = 2 * EPISODES - sum(kept())
    assert 0 < left <= 2 * (EPISODES - PER_UPDATE)
    assert not list((tmp_path / "small").glob("*.json"))
    call(file)
    assert len(steps) - 1 == left
    again = bench_file(tmp_path, stem="again", **terms)
    (tmp_path / "small").rename(tmp_path / "killed")
    call(again)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "again")


def test_a_cell_that_another_bench_computes_for_another_file_is_computed(tmp_path: Path, steps: list[int]) -> None:
    mine, theirs = (bench_file(tmp_path, stem=stem, agents=["uniform"]) for stem in ("mine", "theirs"))
    folder = tmp_path / "mlruns" / "bench"
    folder.mkdir(parents=True)
    (other,) = read_bench(theirs).cells
    with FileLock(folder / f"{other.key}.lock"):
        call(mine)
    (cell,) = read_bench(mine).cells
    assert cell.digest == other.digest
    assert cell.path.exists()


def test_a_cell_that_another_bench_computes_is_left_to_it(tmp_path: Path, steps: list[int]) -> None:
    file = bench_file(tmp_path, agents=["uniform", "mlp-first"])
    other = read_bench(file).cells[0]
    folder = tmp_path / "mlruns" / "bench"
    folder.mkdir(parents=True)
    with FileLock(folder / f"{other.key}.lock"):
        (table,), said = call(file)
    assert "uniform, seed 0: skipped: another bench is computing it" in said
    assert "Small: another bench is computing the missing cells; when it has ended" in said
    assert [row.label for row in table.rows] == ["mlp-first"]
    call(file)
    assert sorted(path.stem for path in (tmp_path / "small").iterdir()) == ["mlp-first-seed0", "uniform-seed0"]
    assert len(steps) - 1 == 2


def test_a_cell_that_another_bench_has_finished_meanwhile_is_not_computed_again(tmp_path: Path) -> None:
    (cell,) = read_bench(bench_file(tmp_path, agents=["uniform"], seeds=[0])).cells
    runner = cell_module.CellRunner(Reporter(Console(quiet=True)))
    cell.path.parent.mkdir()
    cell.path.write_text("done")
    runner(Job(cell, (), None))
    assert cell.path.read_text() == "done"


@pytest.mark.parametrize("moved", ["org/model", "org/text.txt"])
def test_what_a_workers_machine_lacks_is_not_looked_up_on_the_hub(
    moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = glass_tables(tmp_path)
    shutil.copytree(tables["model"]["name"], "org/model")
    shutil.copy(tables["data"]["search"], "org/text.txt")
    given = {"model": {"name": "org/model"}, "data": {"calibration": "org/text.txt"}}
    each = read_bench(bench_file(tmp_path, agents=["uniform"], seeds=[0], tables=given))
    reporter = Reporter(Console(quiet=True))
    job = CellQueue(each.cells[:1], each.cells, {each.file: None}, reporter).take(0)
    assert isinstance(job, Job)
    Path(moved).rename("org/moved")  # as if this were another machine
    with pytest.raises(WorkerError, match=f"a worker on .* does not see {tmp_path / moved}"):
        cell_module.CellRunner(reporter)(job)


REWARD = """
import ffgym

class Acme(ffgym.Reward):
    '''The loss.'''

    name = "acme"

    def __call__(self, pruned, dense):
        return -pruned.loss

@ffgym.hookimpl
def ffgym_rewards():
    return [Acme]
"""


def test_a_plugin_that_a_workers_machine_lacks_is_named_with_its_package(
    tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme-rewards", REWARD)
    each = read_bench(bench_file(tmp_path, agents=["uniform"], seeds=[0], tables={"reward": {"name": "acme"}}))
    reporter = Reporter(Console(quiet=True))
    job = CellQueue(each.cells[:1], each.cells, {each.file: None}, reporter).take(0)
    assert isinstance(job, Job)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")  # as if this were another machine
    with pytest.raises(WorkerError, match=r"a worker on .* does not have reward 'acme'") as raised:
        cell_module.CellRunner(reporter)(job)
    assert raised.value.hint == "Install acme-rewards 1.0 on all machines of the cluster."


def test_a_model_that_is_nowhere_is_said_to_be_missing_and_no_worker_is_blamed(tmp_path: Path) -> None:
    gone = {"model": {"name": f"{tmp_path / 'gone'}"}}
    with pytest.raises(ModelError, match="gone' does not exist"):
        call(bench_file(tmp_path, agents=["uniform"], seeds=[0], tables=gone))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cells_that_fail_are_named_and_the_others_are_computed(finished: Any, tmp_path: Path, workers: int) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    variants: dict[str, dict[str, Any]] = {
        "greedy": {"agent": {"name": "random"}, "prune": {"sparsity": 0.99}},
        "short": {"agent": {"name": "uniform"}, "data": {"search": str(tmp_path / "short.txt")}},
    }
    new_store(tmp_path / "mlruns")
    labels, tables = ["greedy", "short", *AGENTS], {"tracking": {"enabled": True}}
    file = bench_file(tmp_path, agents=labels, variants=variants, tables=tables)
    done = CliRunner().invoke(app, ["bench", str(file), "--workers", str(workers)])
    assert done.exit_code == 1, done.stderr
    assert numbers(tmp_path / "small") == numbers(finished[0].parent / "small")
    missing = "Not finished: 5 of 8 cells; missing seeds: greedy 2 of 2, short 1 of 1. "
    assert missing in file.with_suffix(".md").read_text()
    assert missing in done.stdout
    assert re.search("^reinforce .* 2 ", done.stdout, re.MULTILINE), "the table is printed, too"
    progress, error = done.stderr.split("error: 3 cells failed\n")
    assert all(f"{cell}: failed: " in progress for cell in ("greedy, seed 0", "greedy, seed 1", "short, seed 0"))
    assert "another bench" not in progress
    assert re.search(r"^greedy, seed 0; greedy, seed 1: .*sparsity 0\.99", error, re.MULTILINE)
    assert re.search(r"^short, seed 0: .*short\.txt", error, re.MULTILINE)
    assert error.endswith("hint: Finished cells are kept, and the same command goes on.\n")
    assert {run.info.run_name: run.info.status for run in runs(tmp_path / "mlruns")}["Small"] == "FAILED"

    del variants["greedy"]["prune"], variants["short"]["data"]  # now they are the same work as cells that are there
    bench_file(tmp_path, agents=labels, variants=variants, tables=tables)
    (table,), said = call(file)
    assert "Not finished" not in table.header
    assert "cell 1 of" not in said
    assert [run.info.status for run in runs(tmp_path / "mlruns") if run.info.run_name == "Small"] == ["FINISHED"]


def test_a_text_that_all_cells_lack_stops_the_bench_at_once(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    file = bench_file(tmp_path, tables={"data": {"search": str(tmp_path / "short.txt")}})
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(DataError, match="random, seed 0: ") as raised:
        bench([file], progress=console)
    assert str(raised.value.hint).endswith("Finished cells are kept, and the same command goes on.")
    assert "cell 2 of 5" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_rule_whose_one_episode_is_short_has_its_row(tmp_path: Path) -> None:
    file = bench_file(tmp_path, agents=["random", "uniform"], seeds=[0], tables={"schedule": {"fidelity": "cubic"}})
    (table,), _ = call(file)
    assert [row.label for row in table.rows if row.seeds == 1] == [row.label for row in table.rows]
    (mark,) = numbers(tmp_path / "small")["uniform-seed0"]["marks"]
    assert mark["tokens"] == WINDOW  # the ramp begins with one window of two
    (again,), _ = call(file, only_report=True)
    assert again == table


# interrupted and started again


def test_an_interrupted_bench_ends_with_the_same_numbers_and_measures_nothing_twice(
    finished: Any, tmp_path: Path, steps: list[int]
) -> None:
    file = bench_file(tmp_path)
    for after in (EPISODES, EPISODES + PER_UPDATE + 1):  # between cells, within one
        steps[0] = after
        with pytest.raises(KeyboardInterrupt):
            call(file)
        assert len(numbers(tmp_path / "small")) == 1
    steps[0] = 10**6
    call(file)
    assert len(steps) - 1 == 4 * EPISODES + 1
    assert numbers(tmp_path / "small") == numbers(finished[0].parent / "small")


def test_ctrl_c_while_the_report_is_measured_costs_no_episode(finished: Any, tmp_path: Path, steps: list[int]) -> None:
    file = bench_file(tmp_path, agents=["reinforce"], seeds=[1])
    with pytest.raises(KeyboardInterrupt):
        bench([file], progress=stopping("report split: done", KeyboardInterrupt()))
    call(file)
    assert len(steps) - 1 == EPISODES
    assert numbers(tmp_path / "small") == {
        "reinforce-seed1": numbers(finished[0].parent / "small")["reinforce-seed1"],
    }


def test_ctrl_c_while_a_finished_cell_is_written_leaves_nothing_open(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_store(tmp_path / "mlruns")
    file = bench_file(tmp_path, agents=["reinforce"], seeds=[1], tables={"tracking": {"enabled": True}})
    write = cell_module.write_result

    def interrupted(path: Path, result: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(path, result)

    with monkeypatch.context() as patch:
        patch.setattr(cell_module, "write_result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call(file)
    assert {run.info.run_name: run.info.status for run in runs(root)} == {
        "Small": "KILLED",
        "Small: reinforce, seed 1": "FINISHED",
    }
    assert not file.with_suffix(".md").exists()
    (again,), _ = call(file)  # only the table is left to write
    assert [row.label for row in again.rows] == ["reinforce"]
    parent = next(run for run in runs(root) if run.info.run_name == "Small")
    assert (len(runs(root)), parent.info.status) == (2, "FINISHED")
    assert "small.md" in {item.path for item in client(root).list_artifacts(parent.info.run_id)}
    assert list((root / "bench").iterdir()) == []
    assert numbers(tmp_path / "small")["reinforce-seed1"] == numbers(finished[0].parent / "small")["reinforce-seed1"]


EDITED = """
import ffgym
from ffgym.agents.reinforce import Reinforce

class Edited(Reinforce):
    name = "edited"
    edition = 1

@ffgym.hookimpl
def ffgym_agents():
    return [Edited]
"""


def test_a_cell_whose_agent_has_a_new_edition_starts_anew(
    tmp_path: Path, steps: list[int], install: Callable[..., None]
) -> None:
    install("acme-edited", EDITED)
    agent = {"name": "edited", "slopes": False}
    file = bench_file(tmp_path, agents=["edited"], seeds=[1], tables={"agent": agent})
    steps[0] = 5
    with pytest.raises(KeyboardInterrupt):
        call(file)
    importlib.import_module("acme_edited").Edited.edition = 2
    steps[:] = [10**6]
    call(file)
    assert len(steps) - 1 == EPISODES
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "small").glob("*.json"))
    assert result["editions"] == {"agent": 2}


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


def test_the_command_takes_many_files(finished: Any, tmp_path: Path) -> None:
    other = bench_file(tmp_path, stem="other", title="Other", agents=["uniform"])
    done = CliRunner().invoke(app, ["bench", str(finished[0]), str(other)])
    assert done.exit_code == 0, done.stderr
    assert "Small" in done.stdout
    assert "Other" in done.stdout
    assert "cell" not in done.stdout


def test_json_holds_the_rows_and_names_the_files(finished: Any) -> None:
    done = CliRunner().invoke(app, ["bench", str(finished[0]), "--json"])
    assert done.exit_code == 0, done.stderr
    (table,) = json.loads(done.stdout)
    assert table["title"] == "Small"
    assert all(row["perplexity"] > 1.0 for row in table["rows"])
    written = [str(finished[0].with_suffix(ending)) for ending in (".md", ".png")]
    assert table["files"] == written
    assert all(name in done.stderr for name in written)


def test_two_benches_that_would_write_one_file(tmp_path: Path) -> None:
    first = bench_file(tmp_path, agents=["random"], results="shared")
    second = bench_file(tmp_path, stem="more", agents=["random"], results="shared", tables={"prune": {"sparsity": 0.3}})
    with pytest.raises(ConfigError, match="two benches would write"):
        call(first, second)


def test_committed_results_belong_to_the_configuration_beside_them() -> None:
    """A key that is added later, or a default that moves, must not orphan what was measured."""
    cells, dated = {}, set[Path]()  # two benches may share results
    for file in sorted((Path(__file__).parents[2] / "experiments").glob("*/*.toml")):
        if (file.parent / "results").exists() and "agents" in file.read_text(encoding="utf-8"):
            read = read_bench(file)
            cells |= {cell.path: cell.config for cell in read.cells}
            dated |= set(read.results if read.spec.dated else ())
    measured = {path for folder in {path.parent for path in cells} for path in folder.glob("*.json")}
    assert measured <= cells.keys() | dated
    for path in measured & cells.keys():
        assert configured.changed_since(CELL_RESULT.read(path).settings, cells[path]) == [], path
    assert len(measured) > 100
