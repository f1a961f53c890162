"""Many runs on equal terms: every agent on the same environment, splits and number of evaluated tokens.

One *cell* is one agent with one seed in one configuration (`ffgym.bench.cell`). It writes one small JSON file, named by
agent and seed, with all settings that decide its numbers; what is there already is not computed again. The cells of all
files form one queue: the first seed of everything comes first.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from ffgym.bench.cell import CELL_RESULT, Cell, noted_run, write_result
from ffgym.bench.checks import check_benches, check_dense_losses, unanswered
from ffgym.bench.file import Bench, read_bench
from ffgym.bench.queue import GOES_ON, Failure, compute
from ffgym.bench.table import BenchTable, CellResult, bench_figure, bench_table, markdown
from ffgym.config.tables import WorkersTable
from ffgym.config.toml import CONFIGURATION, flatten
from ffgym.costs.timing import computing_threads
from ffgym.errors import FFGymError
from ffgym.files import COPY, check_writable, disk_errors, write_text
from ffgym.pipeline.agent import make_agent
from ffgym.prepare.workers import cluster_of
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter
from ffgym.tracking.tracker import Tracker
from ffgym.types import JSONDict

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster


class CellsError(FFGymError):
    """Cells of a bench failed, and the others are computed. The message has each error once, the notes how it came.

    Args:
        failures: at least one.
        tables: of the cells that are there.
    """

    def __init__(self, failures: Sequence[Failure], tables: Sequence[BenchTable]) -> None:
        cells: dict[str, list[str]] = {}
        for failure in failures:
            cells.setdefault(failure.error, []).append(failure.cell)
        errors = [f"{'; '.join(names)}: {error}" for error, names in cells.items()]
        super().__init__("\n".join([f"{counted(len(failures), 'cell')} failed", *errors]), hint=GOES_ON)
        self.tables = list(tables)
        for failure in failures:
            self.add_note(f"{failure.cell}:\n{failure.traceback}")


def bench(
    files: Sequence[str | Path],
    *,
    progress: Console | None = None,
    only_report: bool = False,
    workers: int = 1,
    ray_address: str | None = None,
) -> list[BenchTable]:
    """Run what is missing of every bench, then write the tables and figures beside the results.

    Args:
        files: bench TOML files; they must agree on the model.
        only_report: compute nothing, show what is there.
        workers: cells that are computed at the same time, each in a process of its own. On this machine they share
            torch's threads.
        ray_address: of the Ray cluster that the workers run on; this machine where left out.

    Raises:
        ConfigError: no agents, mixed models, unequal terms, updates that are too small, or results of another
            configuration.
        WorkerError: see `cluster_of`; or workers are lost again and again.
        CellsError: cells failed; it has the tables of the others.
    """
    reporter = Reporter(progress)
    benches = [read_bench(Path(file)) for file in files]
    stored = check_benches(benches)
    tables: list[BenchTable] = []
    failures: list[Failure] = []
    with ExitStack() as stack:
        runs: dict[Path, Tracker] = {}
        if not only_report:
            with disk_errors():
                share(benches)
                missing = _missing(benches)
                written = [each.file.with_suffix(".md") for each in benches] + [cell.path for cell in missing]
                for path in {path.parent: path for path in written}.values():
                    check_writable(path, COPY)  # before hours of work, not after them
                wanted = WorkersTable(count=workers, ray_address=ray_address)
                cluster = stack.enter_context(_workers(wanted, missing, reporter)) if missing else None
                runs = _open_runs(benches, missing, stack, reporter)
                if missing:
                    parents = {file: tracker.run_id for file, tracker in runs.items()}
                    cells = [cell for each in benches for cell in each.cells]
                    failures = compute(missing, cells, parents, reporter, cluster)
                    share(benches)
        for each in benches:
            results = {path: stored.get(path) or CELL_RESULT.read(path) for path in each.results}
            check_dense_losses(each, results)  # again: the model may have changed since earlier results
            if not (only_report or failures) and len(results) < len(each.cells):
                reporter.print(
                    f"{each.spec.title}: another bench is computing the missing cells; when it has ended, "
                    f"`ffgym bench {shlex.quote(str(each.file))} --report` shows them"
                )
            if not results:
                reporter.print(f"{each.spec.title}: no results yet")
                continue
            tables.append(table := _write_table(each, list(results.values()), runs.get(each.file)))
            reporter.print(f"{each.spec.title}: wrote {' and '.join(table.files)}")
            if each.file in runs and not failures:
                _parent_note(each).unlink(missing_ok=True)
        if failures:
            raise CellsError(failures, tables)
    return tables


@contextmanager
def _workers(table: WorkersTable, missing: Sequence[Cell], reporter: Reporter) -> Iterator[Cluster | None]:
    """The workers for what is missing, and the number of threads that each of them, or this process, has."""
    before = torch.get_num_threads()
    threads = before if table.ray_address else max(1, before // table.count)
    least = 2 if table.ray_address else 1  # one worker would be this process
    wanted = table.model_copy(update={"count": min(table.count, max(least, len(missing)))})
    device = missing[0].config.model.device
    with computing_threads(threads), cluster_of(wanted, device, reporter.print) as cluster:
        yield cluster


def _write_table(bench: Bench, results: Sequence[CellResult], run: Tracker | None) -> BenchTable:
    """The table, and a picture of its searches, beside the bench file, and in its MLflow run where there is one."""
    spec = bench.spec
    table = bench_table(spec.title, results, baselines=spec.baseline)
    table = replace(table, header=_reservation(bench, results) + table.header)
    files = [bench.file.with_suffix(".md")]
    write_text(files[0], markdown(table))
    if any(len(result.marks) > 1 for result in results):  # rules take one episode: there is nothing to draw over tokens
        files.append(bench.file.with_suffix(".png"))
        bench_figure(table, results, files[1])
    if run is not None:
        run.describe(markdown(table))
        for file in files:
            run.log_artifact(file)
    return replace(table, files=tuple(map(str, files)))


def _reservation(bench: Bench, results: Sequence[CellResult]) -> str:
    """What a reader must know before the numbers: that they are of earlier code, or which cells are missing."""
    if bench.spec.dated:
        return f"Computed {bench.spec.dated} by an earlier version, with the settings in the result files. "
    if len(results) == len(bench.cells):
        return ""
    wanted, there = (Counter(each.label for each in cells) for cells in (bench.cells, results))
    missing = ", ".join(f"{label} {count} of {wanted[label]}" for label, count in (wanted - there).items())
    return f"Not finished: {len(results)} of {len(bench.cells)} cells; missing seeds: {missing}. "


def share(benches: Sequence[Bench]) -> None:
    """Copy results to the cells of other benches, or of other labels, that would compute the same."""
    cells = [cell for each in benches for cell in each.cells]
    finished = [cell for cell in cells if cell.path.exists()]
    for cell in (cell for cell in cells if not cell.path.exists()):
        twins = (CELL_RESULT.read(twin.path) for twin in finished if twin.digest == cell.digest)
        if result := next((twin for twin in twins if not unanswered(twin, cell)), None):
            write_result(cell.path, result.model_copy(update={"label": cell.label}))


def _missing(benches: Sequence[Bench]) -> list[Cell]:
    """What has to be computed, in the order of the files; cells that are the same work become one that says it all."""
    wanted: dict[str, Cell] = {}
    for cell in (cell for each in benches for cell in each.cells if not cell.path.exists()):
        twin = wanted.get(cell.digest, cell)
        wanted[cell.digest] = replace(twin, marks=max(twin.marks, cell.marks), plain=twin.plain or cell.plain)
    return list(wanted.values())


def _open_runs(
    benches: Sequence[Bench], missing: Sequence[Cell], stack: ExitStack, reporter: Reporter
) -> dict[Path, Tracker]:
    """One MLflow run per bench file that has something to compute, open until the stack is left.

    A bench that was interrupted goes on in the run it had, even if only its table is left to write: a note says which.
    """
    for cell in missing:
        make_agent(cell.config)  # so that a wrong option is refused before any cell is computed
    runs: dict[Path, Tracker] = {}
    computing = {cell.bench for cell in missing}
    for each in (each for each in benches if each.cells):
        note = _parent_note(each)
        if each.file in runs or (each.file not in computing and not note.exists()):
            continue
        again = f"ffgym bench {shlex.quote(str(each.file))}"
        run = stack.enter_context(noted_run(each.cells[0].config, each.spec.title, note, reporter, again=again))
        run.log_config(_shared(each), CONFIGURATION.text(each.file))
        runs[each.file] = run
    return runs


def _shared(bench: Bench) -> JSONDict:
    """The settings that all cells of a bench have in common, and which agents and seeds it has."""
    first, *others = (flatten(cell.config.model_dump(mode="json")) for cell in bench.cells)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return shared | {"agent.name": ", ".join(bench.spec.agents), "seed": bench.spec.seeds_in_words}


def _parent_note(bench: Bench) -> Path:
    """Where a bench that is under way notes its MLflow run, so that it goes on in the same one when interrupted."""
    name = hashlib.sha256(str(bench.file.resolve()).encode()).hexdigest()[:16]
    return bench.cells[0].config.tracking.folder / "bench" / f"{name}.run"
