"""What a recovery shows at its end: the table and the model card. Nothing here measures anything."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ffgym.errors import ModelError
from ffgym.files import FileFormat
from ffgym.report.card import TAGS, loading
from ffgym.report.layout import Column, Table, humane, label_column
from ffgym.report.paired import MARGIN, SIGN, Difference, difference_columns, paired_difference, standard_error
from ffgym.report.table import perplexity_text
from ffgym.types import Evaluation, JSONDict

CARD = FileFormat("model card", str, ModelError, "Write it again as UTF-8 text, or delete it.")
TRIED = "A pruned model. Training it after pruning was tried and undone: these are the weights from before."


@dataclass(frozen=True)
class Measured:
    """One model on the report split."""

    label: str
    evaluation: Evaluation
    parameters: int


@dataclass(frozen=True)
class RecoveryTable:
    """Models before and after, measured alike."""

    rows: tuple[Measured, ...]  # dense where it is known, then before, then recovered
    header: str

    def layout(self) -> Table[Measured]:
        """What stands where."""
        differences = difference_columns(self.rows, "before", self._difference, lambda _: "")
        columns: list[Column[Measured]] = [
            label_column(lambda row: row.label),
            Column("perplexity", _perplexity, plain=_losses),
            *differences,
            Column("params", lambda row: humane(row.parameters), plain=lambda row: {"parameters": row.parameters}),
        ]
        notes = [f"Nats per token against before, on the same windows, {MARGIN}; {SIGN}"] if differences else []
        if len(self.rows[0].evaluation.losses) > 1:
            notes.append("Perplexity: ± one standard error over windows.")
        return Table(columns, self.rows, [*notes, self.header], space=1)

    def _difference(self, row: Measured) -> Difference | None:
        before = self.rows[-2]
        return None if row is before else paired_difference([row.evaluation.losses], [before.evaluation.losses])


def _perplexity(row: Measured) -> str:
    perplexity, error = row.evaluation.perplexity, standard_error(row.evaluation.losses)
    spread = "" if error is None or not math.isfinite(perplexity) else f" ± {perplexity_text(perplexity * error)}"
    return perplexity_text(perplexity) + spread


def _losses(row: Measured) -> JSONDict:
    found = row.evaluation
    return {"perplexity": found.perplexity, "loss": found.loss, "loss_stderr": standard_error(found.losses)}


def recovered_card(
    *,
    title: str,
    is_kept: bool,
    before: str | None,
    summary: Sequence[str],
    table: RecoveryTable,
    command: str,
    stock: bool = False,
    towers: bool = False,
) -> str:
    """Write the model card of a recovered model.

    Args:
        is_kept: training lowered the held-out loss, and was not undone.
        before: the card of the model as it was before; ``None`` where it had none.

    Returns:
        YAML front matter, that of the earlier card where it has one, and Markdown.
    """
    front, body = _split(before or "")
    sections = [
        front or "\n".join(["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in TAGS), "---"]),
        f"# {title}",
        " ".join(["A pruned model that was trained after pruning." if is_kept else TRIED, *summary]),
        "## Load it",
        loading(stock=stock, towers=towers),
        "## What it brought",
        table.layout().markdown().rstrip(),
        f"```console\n$ {command}\n```",
        "Training text, search split and report split do not overlap. Which weights to keep was decided on the search "
        "split; the report split was measured afterwards.",
    ]
    if body:
        sections += ["## The model before that", "What follows is its card as it was.", _demoted(body)]
    return "\n\n".join(sections) + "\n"


def _split(text: str) -> tuple[str, str]:
    """The YAML front matter of a model card with its dashes, empty where there is none, and the rest."""
    found = re.match(r"\s*(---\n.*?^---)$(.*)", text, flags=re.DOTALL | re.MULTILINE)
    return (found[1], found[2].strip()) if found else ("", text.strip())


def _demoted(text: str) -> str:
    """Two levels more before every heading outside code."""
    lines, in_code = [], False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not in_code else line)
    return "\n".join(lines)
