"""How far a bench is: the time that is left by tokens, and one MLflow run however often it is interrupted."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from glass_runs import EPISODES, PER_UPDATE, bench_file, other_dtype
from mlflow_store import client, new_store, runs
from rich.console import Console

from ffgym.bench.bench import bench
from ffgym.bench.cell import CELL_RESULT, Job
from ffgym.bench.file import read_bench
from ffgym.bench.queue import CellQueue
from ffgym.report.progress import Reporter

pytestmark = pytest.mark.usefixtures("only_builtins")


def test_what_is_left_is_counted_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule evaluates 128 + 1,024 tokens here, a search 1,024 + 768 (finals) + 6 x 1,024: seven times as many.

    Random draws recommend nothing, so their finals take 1,024.
    """
    each = read_bench(bench_file(tmp_path, agents=["uniform", "random", "cma-es"]))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    queue = CellQueue(each.cells, each.cells, {each.file: None}, Reporter(console))
    now[0] += 60.0  # workers start
    for _ in each.cells:
        now[0] += written(queue.take(0), tokens_a_second=100)
        queue.done(0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "left" not in lines[0]
    assert lines[1].endswith("random, seed 0, 2:41 left in all")  # 16,128 tokens at 100 a second
    assert lines[2].endswith("cma-es, seed 0, 1:19 left in all")  # 7,936


def written(job: Job | None, tokens_a_second: float) -> float:
    """Write a cell's file as if it had been computed; how long that took, in seconds."""
    assert job is not None
    job.cell.path.parent.mkdir(exist_ok=True)
    job.cell.path.touch()
    return (1152 if job.cell.label == "uniform" else 8192) / tokens_a_second


def test_what_another_bench_computes_takes_no_time_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = read_bench(bench_file(tmp_path, agents=["random", "pathwise", "cma-es", "evopress"]))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    queue = CellQueue(each.cells, each.cells, {each.file: None}, Reporter(console))
    queue.take(0)
    queue.done(0)  # random: another bench has its lock, and no file is there yet
    now[0] += written(queue.take(0), tokens_a_second=100)
    queue.done(0)
    each.cells[2].path.touch()  # cma-es: written by the other bench
    queue.take(0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].endswith("pathwise, seed 0"), "nothing has been computed that could tell how long it takes"
    assert lines[2].endswith("cell 4 of 4: evopress, seed 0, 1:22 left in all")


def test_an_interrupted_bench_goes_on_in_its_mlflow_run(tmp_path: Path, steps: list[int]) -> None:
    new_store(tmp_path / "mlruns")
    file = bench_file(tmp_path, agents=["uniform", "random"], tables={"tracking": {"enabled": True}})
    steps[0] = 1 + PER_UPDATE + 1
    with pytest.raises(KeyboardInterrupt):
        bench([file], progress=Console(quiet=True))
    steps[0] = 10**6
    (parent,) = [run for run in runs(tmp_path / "mlruns") if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "KILLED"
    bench([file], progress=Console(quiet=True))
    (again,) = [run for run in runs(tmp_path / "mlruns") if "mlflow.parentRunId" not in run.data.tags]
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    title = parent.info.run_name
    children = [run for run in runs(tmp_path / "mlruns") if run.info.run_id != parent.info.run_id]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.info.run_name for run in children) == [
        f"{title}: {agent}, seed 0" for agent in ("random", "uniform")
    ], "one for each cell"
    assert {run.info.status for run in children} == {"FINISHED"}
    pages = [run.data.tags.get("mlflow.note.content", "") for run in (again, *children)]
    assert not [page for page in pages if "Interrupted" in page]
    searched = next(run for run in children if run.info.run_name == f"{title}: random, seed 0")
    history = client(tmp_path / "mlruns").get_metric_history(searched.info.run_id, "search/reward")
    assert [point.step for point in history] == list(range(EPISODES)), "no episode is logged twice"
    assert list((tmp_path / "mlruns" / "bench").iterdir()) == []


def test_a_search_is_never_made_of_two_dtypes(tmp_path: Path, steps: list[int]) -> None:
    """``auto`` follows the processor, and the next sitting may have another one."""
    file = bench_file(tmp_path, tables={"model": {"dtype": other_dtype()}})
    began = read_bench(file).cells[0]
    steps[0] = PER_UPDATE + 1
    with pytest.raises(KeyboardInterrupt):
        bench([file], progress=Console(quiet=True))
    cell = read_bench(bench_file(tmp_path, tables={"model": {"dtype": "auto"}})).cells[0]
    (log,) = (tmp_path / "mlruns" / "bench").glob("*.jsonl")
    log.rename(log.with_name(log.name.replace(began.key, cell.key)))  # as if auto had meant that dtype
    steps[:] = [10**6]
    bench([file], progress=Console(quiet=True))
    assert len(steps) - 1 == EPISODES, "nothing is taken from the search in the other dtype"
    assert CELL_RESULT.read(cell.path).dtype != other_dtype()
