"""Reads finished runs back from their folders, and puts them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ffgym.config.mixture import described
from ffgym.config.tables import PLUGIN_TABLES, RunConfig
from ffgym.config.toml import differences, written
from ffgym.errors import DataError, OutputError
from ffgym.files import FileFormat
from ffgym.pipeline.folder import MEASURE_AGAIN, is_searched, resume_command, stored_config
from ffgym.prepare.configured import ONCE
from ffgym.report.comparison import ComparedRun, Comparison
from ffgym.report.front import Front
from ffgym.report.table import ReportTable, Row
from ffgym.tracking.names import parameters
from ffgym.tracking.runs import find_run, run_with_id

TABLE = FileFormat("table of a run", ReportTable, OutputError, MEASURE_AGAIN)
FRONT = FileFormat("front of a run", Front, OutputError, MEASURE_AGAIN)


@dataclass(frozen=True)
class StoredRun:
    """A run as its folder has it; an unfinished one has no table."""

    folder: Path
    config: RunConfig
    table: ReportTable | None


def stored_run(text: str, root: Path, experiment: str) -> StoredRun:
    """A run as its user names it: by its folder, or by what `ffgym.tracking.runs.find_run` takes."""
    folder = Path(text).expanduser()
    if not folder.is_dir():
        found = find_run(root, text, experiment)
        if found.folder is None and found.parent is not None:
            whole = run_with_id(root, found.parent, f"{found.name} is part of another run, but ")
            if whole.folder is not None:
                raise OutputError(
                    f"the run {found.name} ({found.id}) is a point of the run {whole.name}, and has no folder itself",
                    hint=f"Name {whole.folder}: it is compared by its main point, which output.save_at chooses.",
                )
            raise OutputError(
                f"the run {found.name} ({found.id}) is a cell of the bench {whole.name}, and has no folder",
                hint="`ffgym bench FILE --report` compares the cells of a bench.",
            )
        if found.folder is None or not found.folder.is_dir():
            where = "is not known" if found.folder is None else f"{found.folder} does not exist"
            raise OutputError(
                f"the folder of the run {found.name} ({found.id}) {where}", hint="Name the folder where it lies now."
            )
        folder = found.folder
    return StoredRun(folder.resolve(), stored_config(folder), read_table(folder) if is_searched(folder) else None)


def read_table(folder: Path) -> ReportTable:
    """The table of a run."""
    path = folder / "losses.json"
    table = TABLE.read(path)
    _check_rows(table.rows, TABLE, path)
    return table


def read_front(folder: Path) -> Front | None:
    """The front of a run over a range of budgets; ``None`` where there is none."""
    path = folder / "front.json"
    if not path.is_file():
        return None
    front = FRONT.read(path)
    rows = [row for point in front.points for row in (point.found, *point.references.values())]
    _check_rows([front.dense, *rows], FRONT, path)
    if len({tuple(point.references) for point in front.points}) != 1:
        raise FRONT.refused(str(path), "every point must have the same references")
    return front


def _check_rows(rows: Sequence[Row], form: FileFormat[Any], path: Path) -> None:
    """Refuse rows that do not fit the first one, the dense model's, or that no table could be made of."""
    alike = {(*(cost.key for cost in row.costs), len(row.losses)) for row in rows}
    if len(alike) != 1 or not rows[0].costs or not rows[0].losses:
        reason = "every row must have the same costs, parameters first, and a loss for every window"
        raise form.refused(str(path), reason)
    if any(row.perplexity <= 0 for row in rows):
        raise form.refused(str(path), "every perplexity must be above 0")


def compare_runs(runs: Sequence[StoredRun]) -> Comparison:
    """Put finished runs side by side; refuse one that is named twice, and runs measured on different windows."""
    for one, other in combinations(runs, 2):
        if one.folder == other.folder:
            raise DataError(f"{one.folder} is named twice", hint="Name each run once.")
    compared, first = [], runs[0]
    for run in runs:
        if run.table is None:
            raise OutputError(
                f"the run in {run.folder} is not finished: it has no table yet",
                hint=f"Continue it: {resume_command(run.folder)}",
            )
        if first.table is not None and first.table.windows != run.table.windows:
            raise DataError(
                f"the runs in {first.folder} and {run.folder} share no windows of text: {_measured_on(first)}, and "
                f"{_measured_on(run)}",
                hint="Perplexities of different text cannot be compared: repeat one run with the other's report split.",
            )
        config, changes = run.config, _changes(first.config, run.config)
        agent = parameters(config.model_dump(mode="json"))["agent"]  # as `ffgym runs` and MLflow show it
        names = (_name(run, runs), agent, config.criterion.name, config.prune.resource)
        target = config.main_target if config.prune.is_range else None
        compared.append(ComparedRun(*names, run.table, changes, target))
    return Comparison(tuple(compared))


def _changes(first: RunConfig, config: RunConfig) -> str:
    """``"search.episodes = 24 (not 48)"``; of a plugin that is another one, without its options."""
    found = {key: f"{key} = {written(here)} (not {written(there)})" for key, there, here in differences(first, config)}
    if not (first.searches and config.searches):  # a rule is measured once, whatever the other run was told
        found = {key: text for key, text in found.items() if key not in {f"search.{name}" for name in ONCE}}

    def belongs_to_another(key: str) -> bool:
        table, _, own = key.partition(".")
        model = PLUGIN_TABLES.get(table)
        return model is not None and own not in model.model_fields and f"{table}.{model.named_by}" in found

    return ", ".join(text for key, text in found.items() if not belongs_to_another(key))


def _name(run: StoredRun, runs: Sequence[StoredRun]) -> str:
    """Its folder's name, behind as many of the folders above as it takes to tell it from the others."""
    parts = run.folder.parts
    for count in range(1, len(parts)):
        if sum(other.folder.parts[-count:] == parts[-count:] for other in runs) == 1:
            return "/".join(parts[-count:])
    return str(run.folder)


def _measured_on(run: StoredRun) -> str:
    data = run.config.data
    text = f"{data.whole_tokens('report'):,} tokens of {described(data.report)} in windows of {data.window:,}"
    return f"{text} for {run.config.model.name}"
