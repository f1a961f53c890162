"""The table of a run: perplexity, sparsity and size of the dense model and of every pruned one, side by side.

Its columns stand once, in :meth:`ReportTable.layout`: for the terminal, for model cards, for ``--json`` and MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ffgym.report.layout import STAR, Column, Table, finite
from ffgym.types import JSONDict


@dataclass(frozen=True)
class Cost:
    """What a whole model costs in one resource.

    Attributes:
        key: the resource's key in JSON, e.g. ``"macs_per_token"``.
        column: head of its column, e.g. ``"MACs/token"``.
        value: the cost.
        text: the cost as tables print it.
    """

    key: str
    column: str
    value: float
    text: str


@dataclass(frozen=True)
class Row:
    """One model, measured on the report split.

    Attributes:
        label: what the row is called, e.g. ``"uniform + ridge"``.
        perplexity: exp of the mean loss; infinite or NaN where the model broke.
        loss_stderr: standard error of the mean loss over the windows, in nats per token; ``None`` where unknown.
        sparsity_prunable: share of the budget's resource removed over the prunable sublayers, in [0, 1].
        sparsity_model: share of the same resource removed over the whole model, in [0, 1].
        costs: what the whole model costs; the same resources in all rows of a table, ``parameters`` among them.
        note: what a reader must know about this row alone, without a full stop; empty for nothing.
        is_found: the row holds the allocation that the agent found.
    """

    label: str
    perplexity: float
    loss_stderr: float | None
    sparsity_prunable: float
    sparsity_model: float
    costs: tuple[Cost, ...]
    note: str = ""
    is_found: bool = False

    @property
    def values(self) -> dict[str, float]:
        """The costs by key."""
        return {cost.key: cost.value for cost in self.costs}

    @property
    def parameters(self) -> float:
        """Parameters of the whole model."""
        return self.values["parameters"]

    @property
    def is_dense(self) -> bool:
        """Nothing was removed."""
        return self.sparsity_prunable == 0


@dataclass(frozen=True)
class ReportTable:
    """Rows measured alike, and the sentence that says how.

    The dense row is put first, whatever the order given; the others stay as they are.

    Attributes:
        rows: at least one.
        header: how the perplexities were measured, see :func:`measurement`.
    """

    rows: tuple[Row, ...]
    header: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a report table needs at least one row")
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: not row.is_dense)))

    @property
    def best(self) -> Row | None:
        """The pruned row of lowest finite perplexity; the first of equals; ``None`` if there is no such row."""
        pruned = [row for row in self.rows if not row.is_dense and math.isfinite(row.perplexity)]
        return min(pruned, key=lambda row: row.perplexity, default=None)

    def layout(self) -> Table[Row]:
        """What stands where; a console shows it down to 80 columns, also without colours."""
        best = self.best
        columns: list[Column[Row]] = [
            Column(
                "model",
                lambda row: row.label + STAR if row is best else row.label,
                left=True,
                plain=lambda row: {"label": row.label},
                bold=True,
                look={"overflow": "fold"},
            ),
            _number(
                "perplexity",
                perplexity_text,
                lambda row: {"perplexity": finite(row.perplexity), "loss_stderr": finite(row.loss_stderr)},
                bold=True,
            ),
            _share("sparsity prunable", lambda row: row.sparsity_prunable),
            _share("sparsity model", lambda row: row.sparsity_model),
            *(_cost(index, cost.column) for index, cost in enumerate(self.rows[0].costs)),
        ]
        return Table(
            columns,
            self.rows,
            [*self._legend(), self.header],
            best=best,
            row_style=lambda row: "bold green" if row is best else "bold" if row.is_found else "",
            ends_section=lambda row: row.is_dense,
            plain=lambda row: {
                "note": row.note,
                "is_dense": row.is_dense,
                "is_found": row.is_found,
                "is_best": row is best,
            },
        )

    def _legend(self) -> list[str]:
        """Explain the signs that the table uses, and only those; then the rows' notes."""
        signs = []
        if self.best is not None:
            signs.append("* lowest perplexity of the pruned rows.")
        if any("±" in perplexity_text(row) for row in self.rows):
            signs.append("± one standard error over windows; all rows share the windows.")
        return [*signs, *(f"{row.label}: {row.note}." for row in self.rows if row.note)]


def _number(
    head: str, text: Callable[[Row], str], plain: Callable[[Row], JSONDict], *, bold: bool = False
) -> Column[Row]:
    narrow = head.replace(" ", "\n").replace("/", "\n/")
    return Column(head, text, plain=plain, bold=bold, console_head=narrow, look={"no_wrap": True})


def _share(head: str, share: Callable[[Row], float]) -> Column[Row]:
    return _number(head, lambda row: f"{share(row):.1%}", lambda row: {head.replace(" ", "_"): share(row)})


def _cost(index: int, head: str) -> Column[Row]:
    return _number(head, lambda row: row.costs[index].text, lambda row: {row.costs[index].key: row.costs[index].value})


def measurement(
    *,
    model: str,
    corpus: str,
    split: str,
    tokens: int,
    window: int,
    dtype: str,
    bos: bool,
    calibration: str,
    seed: int,
    context: int,
) -> str:
    """Say in one paragraph how the numbers of a table were measured: its ``header``.

    Args:
        model: what was pruned, e.g. ``"SmolLM2-135M-Instruct (dequantised Q4_1)"``.
        corpus: the text that the perplexities are of.
        split: the split of it.
        tokens: predicted tokens.
        window: tokens in one window.
        dtype: of the weights and activations, e.g. ``"bfloat16"``.
        bos: the first window starts with the beginning-of-sequence token.
        calibration: corpus, split and tokens of the statistics and the refit.
        seed: the run's seed.
        context: tokens of context at which MACs per token are counted.
    """
    return (
        f"Model: {model}. Perplexity on {corpus}, {split} split: {tokens:,} tokens in windows of {window:,}, {dtype}, "
        f"{bos_text(bos)}. Calibration: {calibration}. "
        f"MACs at {context:,} tokens of context. Seed {seed}."
    )


def bos_text(bos: bool) -> str:
    """Say which windows start with BOS, where the first one does or does not."""
    return "BOS before the first window alone" if bos else "without BOS"


def perplexity_text(row: Row) -> str:
    """Write a perplexity with two decimals and, where it is known, its standard error."""
    if math.isnan(row.perplexity):
        return "NaN"
    if math.isinf(row.perplexity):
        return "inf"
    if row.perplexity >= 1e5:
        return f"{row.perplexity:.2e}"
    if row.loss_stderr is None or not math.isfinite(row.loss_stderr):
        return f"{row.perplexity:,.2f}"
    # d exp(loss) = exp(loss) d loss
    return f"{row.perplexity:,.2f} ± {row.perplexity * row.loss_stderr:,.2f}"
