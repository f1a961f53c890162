"""What a run returns: its table, where its files are, and how to load the smaller model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.export.checkpoint import SavedModel, load_line
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
        allocation: what ``allocation.json`` holds: units kept per sublayer, and where the search found them.
        folder: where results and pictures are.
        saved: the checkpoint, or ``None`` where none was wanted.
        mlflow_run: MLflow's run id, or ``None`` where tracking is off.
        front: under a range of budgets its points; ``table``, ``allocation``, ``saved`` and ``found`` are those of the
            main target.
        trained: folder of the model that was trained after the final calibration, or ``None`` where there is none.
        recovered: what that training brought, or ``None`` where there was none, or the run was finished before.
        found: the search, and the allocation that it chose; ``None`` where a resumed run was finished before.
    """

    table: ReportTable
    allocation: JSONDict
    folder: Path
    saved: SavedModel | None
    mlflow_run: str | None
    front: Front | None = None
    trained: Path | None = None
    recovered: RecoveredModel | None = None
    found: SearchResult | None = None

    def __repr__(self) -> str:
        row, dense = self.table.result, self.table.dense
        figures = f"{row.label} {row.perplexity_text}, dense {dense.perplexity_text}"
        return f"<RunResult in {self.folder}: perplexity of {figures}>"

    def _repr_markdown_(self) -> str:
        return "\n".join(part._repr_markdown_() for part in (self.front, self.table) if part is not None)

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps``; what the search took only where ``found`` is known."""
        result: JSONDict = {
            "table": self.table.layout().as_dicts(),
            "measured": self.table.header,
            "allocation": self.allocation,
            "front": None if self.front is None else strict(asdict(self.front)),
            "folder": str(self.folder),
            "model": None if self.saved is None else str(self.saved.path),
            "recovered_model": None if self.trained is None else str(self.trained),
            "mlflow_run": self.mlflow_run,
        }
        if self.found is not None:
            result["search_tokens"] = self.found.search_tokens
            result["final_tokens"] = self.found.final_tokens
            result["search_seconds"] = round(self.found.seconds, 1)
        return result

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        front, table = self.front, self.table
        if front is not None:
            console.print(front.layout())
        console.print(table.layout())
        if table.warning is not None:
            console.print(f"Warning: {table.warning}", style="bold red", highlight=False, markup=False)
        lines = [f"Results and pictures: {self.folder}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        trained = None if table.result is table.saved else self.trained  # a training may have brought nothing
        if self.saved is not None:
            broken = table.warning is not None and trained is None
            untrained = "" if trained is None else " as it was before training"
            lines += [
                f"Saved: {table.saved.label}",
                "To look at it all the same, load it with" if broken else f"Load the pruned model{untrained} with",
                f"  {load_line(self.saved.path)}",
            ]
        if self.recovered is not None:
            lines += self.recovered.summary
        if trained is not None:
            lines += ["Load the trained model with", f"  {load_line(trained)}"]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def finished_run(folder: Path, config: RunConfig) -> RunResult | None:
    """The results of the run in a folder, read again; ``None`` where it is not finished."""
    if not is_finished(folder, config):
        return None
    table, model = read_table(folder), target_model_folder(config, folder, config.main_target)
    trained = output_folder(model)
    return RunResult(
        table,
        RESULT.read(folder / "allocation.json"),
        folder,
        SavedModel(model, int(table.saved.parameters)) if model.is_dir() else None,
        read_record(folder).mlflow_run,
        read_front(folder),
        trained if config.recover.method != "none" and trained.is_dir() else None,
    )
