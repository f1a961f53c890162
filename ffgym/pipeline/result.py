"""What a run returns: its table, where its files are, and how to load the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.export.checkpoint import SavedModel, load_line
from ffgym.pipeline.artifacts import allocation_json
from ffgym.pipeline.compare import target_model_folder
from ffgym.pipeline.folder import RESULT, is_finished, read_record
from ffgym.pipeline.stored import read_front, read_table
from ffgym.recover.folders import output_folder
from ffgym.recover.result import RecoveredModel
from ffgym.report.front import Front
from ffgym.report.layout import strict
from ffgym.report.table import ReportTable
from ffgym.search.loop import SearchResult
from ffgym.types import JSONDict


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run returns.

    Attributes:
        table: report-split figures, dense first.
        found: the search, and the allocation that it chose.
        folder: where results and pictures are.
        saved: the checkpoint, or ``None`` where none was wanted.
        recovered: what training after the final calibration brought, or ``None`` where none was wanted.
        mlflow_run: MLflow's run id, or ``None`` where tracking is off.
        front: under a range of budgets its points; ``table``, ``found`` and ``saved`` are those of the main target.
    """

    table: ReportTable
    found: SearchResult
    folder: Path
    saved: SavedModel | None
    mlflow_run: str | None
    front: Front | None = None
    recovered: RecoveredModel | None = None

    def __repr__(self) -> str:
        row, dense = self.table.result, self.table.dense
        figures = f"{row.label} {row.perplexity_text}, dense {dense.perplexity_text}"
        return f"<RunResult in {self.folder}: perplexity of {figures}>"

    def _repr_markdown_(self) -> str:
        return _markdown(self)

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps``; the files in the folder may be another run's by now."""
        return {
            "table": self.table.layout().as_dicts(),
            "measured": self.table.header,
            "allocation": allocation_json(self.found),
            "front": None if self.front is None else strict(asdict(self.front)),
            "folder": str(self.folder),
            "model": None if self.saved is None else str(self.saved.path),
            "recovered_model": None if self.recovered is None else str(self.recovered.saved.path),
            "mlflow_run": self.mlflow_run,
            "search_tokens": self.found.search_tokens,
            "final_tokens": self.found.final_tokens,
            "search_seconds": round(self.found.seconds, 1),
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        load = []
        if self.saved is not None:
            trained = self.recovered is not None and self.recovered.is_kept
            broken = self.table.warning is not None and not trained
            untrained = " as it was before training" if trained else ""
            load += [
                f"Saved: {self.table.saved.label}",
                "To look at it all the same, load it with" if broken else f"Load the pruned model{untrained} with",
                f"  {load_line(self.saved.path)}",
            ]
        if self.recovered is not None:
            load += self.recovered.summary
            if self.recovered.is_kept:
                load += ["Load the trained model with", f"  {load_line(self.recovered.saved.path)}"]
        _print(console, self, load)


@dataclass(frozen=True)
class FinishedRun:
    """Returned when a resumed run was already finished: where its results are.

    Attributes:
        model: folder of the saved model, or ``None`` where there is none.
        recovered_model: folder of the model that was trained afterwards, or ``None`` where there is none.
        mlflow_run: MLflow's run id, or ``None`` where there is none.
    """

    folder: Path
    model: Path | None
    recovered_model: Path | None
    mlflow_run: str | None

    @property
    def table(self) -> ReportTable:
        """Report-split figures, dense first, as the folder has them."""
        return read_table(self.folder)

    @property
    def front(self) -> Front | None:
        """Under a range of budgets its points, as the folder has them."""
        return read_front(self.folder)

    def _repr_markdown_(self) -> str:
        return _markdown(self)

    def to_json(self) -> JSONDict:
        """What :meth:`RunResult.to_json` gives, as far as it lies in the folder."""
        front, table = self.front, self.table
        return {
            "table": table.layout().as_dicts(),
            "measured": table.header,
            "allocation": RESULT.read(self.folder / "allocation.json"),
            "front": None if front is None else strict(asdict(front)),
            "folder": str(self.folder),
            "model": None if self.model is None else str(self.model),
            "recovered_model": None if self.recovered_model is None else str(self.recovered_model),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        load = []
        for model in (self.model, self.recovered_model):
            if model is not None:
                load += [f"Load the model in {model.name}/ with", f"  {load_line(model)}"]
        _print(console, self, load)


def _markdown(result: RunResult | FinishedRun) -> str:
    return "\n".join(part._repr_markdown_() for part in (result.front, result.table) if part is not None)


def _print(console: Console, result: RunResult | FinishedRun, load: Sequence[str]) -> None:
    front, table = result.front, result.table
    if front is not None:
        console.print(front.layout())
    console.print(table.layout())
    if table.warning is not None:
        console.print(f"Warning: {table.warning}", style="bold red", highlight=False, markup=False)
    lines = [f"Results and pictures: {result.folder}"]
    if result.mlflow_run is not None:
        lines.append(f"MLflow run {result.mlflow_run}: compare runs with `ffgym ui`")
    for line in [*lines, *load]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def finished_run(folder: Path, config: RunConfig) -> FinishedRun | None:
    """The results of the run in a folder; ``None`` where it is not finished."""
    if not is_finished(folder, config):
        return None
    model = target_model_folder(config, folder, config.main_target)
    recovered = output_folder(model)
    return FinishedRun(
        folder,
        model if model.is_dir() else None,
        recovered if config.recover.method != "none" and recovered.is_dir() else None,
        read_record(folder).mlflow_run,
    )
