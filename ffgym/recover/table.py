"""What a recovery shows at its end: the table and the model card. Nothing here measures anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffgym.models.origin import split_card
from ffgym.report.card import TAGS, loading
from ffgym.report.layout import Column, Table, humane
from ffgym.report.paired import standard_error
from ffgym.types import Evaluation, JSONDict


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
        columns: list[Column[Measured]] = [
            Column(
                "model",
                lambda row: row.label,
                left=True,
                plain=lambda row: {"label": row.label},
                look={"overflow": "fold"},
            ),
            Column("perplexity", _perplexity, plain=_losses),
            Column("loss against before", self._against_before),
            Column("params", lambda row: humane(row.parameters), plain=lambda row: {"parameters": row.parameters}),
        ]
        notes = ["Loss against before: nats per token, the mean over windows of the difference on the same window."]
        if len(self.rows[0].evaluation.losses) > 1:
            notes.append("± one standard error over windows.")
        return Table(columns, self.rows, [*notes, self.header], space=1)

    def _against_before(self, row: Measured) -> str:
        before = self.rows[-2]
        differences = np.subtract(row.evaluation.losses, before.evaluation.losses)
        error = standard_error(differences)
        return "" if row is before else f"{differences.mean():+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _perplexity(row: Measured) -> str:
    perplexity, error = row.evaluation.perplexity, standard_error(row.evaluation.losses)
    return f"{perplexity:,.2f}" + ("" if error is None else f" ± {perplexity * error:,.2f}")


def _losses(row: Measured) -> JSONDict:
    return {
        "perplexity": row.evaluation.perplexity,
        "loss": row.evaluation.loss,
        "loss_stderr": standard_error(row.evaluation.losses),
    }


def recovered_card(
    *,
    title: str,
    before: str | None,
    summary: Sequence[str],
    table: RecoveryTable,
    command: str,
    stock: bool = False,
    towers: bool = False,
) -> str:
    """Write the model card of a recovered model.

    Args:
        before: the card of the model as it was before; ``None`` where it had none.

    Returns:
        YAML front matter, that of the earlier card where it has one, and Markdown.
    """
    front, body = split_card(before or "")
    sections = [
        front or "\n".join(["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in TAGS), "---"]),
        f"# {title}",
        "A pruned model that was trained after pruning. " + " ".join(summary),
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


def _demoted(text: str) -> str:
    """Two levels more before every heading outside code."""
    lines, in_code = [], False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not in_code else line)
    return "\n".join(lines)
