"""What a recovery hands back."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ffgym.export.checkpoint import SavedModel, load_code, load_line
from ffgym.recover.table import RecoveryTable
from ffgym.tracking.names import Result
from ffgym.types import Evaluation, JSONDict

CURVE = "recovery.json"


@dataclass(frozen=True)
class RecoveredModel:
    """A model that was trained and saved.

    Attributes:
        is_kept: training lowered the held-out loss; otherwise it was undone, and the weights are those from before.
        dtype: that it was trained and measured in, e.g. ``"bfloat16"``.
    """

    saved: SavedModel
    table: RecoveryTable
    after: Evaluation
    summary: tuple[str, ...]
    is_kept: bool
    dtype: str
    mlflow_run: str | None = None

    def __repr__(self) -> str:
        return f"<RecoveredModel in {self.saved.path}: perplexity {self.after.perplexity:,.2f}>"

    @property
    def description(self) -> str:
        """What MLflow shows on the page of the run: what was done, the table, how to load the model."""
        load = f"```python\n{load_code(self.saved.path)}\n```"
        parts = (" ".join(self.summary), self.table.layout().markdown(), load)
        return "\n\n".join(parts)

    @property
    def tracked(self) -> Result:
        """What MLflow calls the result of a recovery."""
        dense = next((row.evaluation.perplexity for row in self.table.rows if row.label == "dense"), None)
        return Result(self.after.perplexity, dense, params=self.table.rows[-1].parameters)

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps``."""
        return {
            "table": self.table.layout().as_dicts(),
            "measured": self.table.header,
            "summary": list(self.summary),
            "model": str(self.saved.path),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        console.print(self.table.layout())
        lines = [*self.summary, f"Model and {CURVE}: {self.saved.path}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        for line in [*lines, "Load the model with", f"  {load_line(self.saved.path)}"]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
