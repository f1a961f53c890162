"""The table of a run: perplexity, sparsity and size of the dense model and of every pruned one, side by side.

Its columns stand once, in :meth:`ReportTable.layout`: for the terminal, for model cards, for ``--json`` and MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic import FiniteFloat

from ffgym.files import Count
from ffgym.report.layout import STAR, Column, Table, label_column, numeric
from ffgym.report.paired import MARGIN, SIGN, Difference, difference_columns, paired_difference
from ffgym.types import Bos

DESTROYED = 10.0  # times the dense perplexity; such a model is of no use


@dataclass(frozen=True)
class Cost:
    """What a whole model costs in one resource."""

    key: str  # the resource's name, e.g. "macs"
    column: str  # head of its column, e.g. "MACs/token"
    value: Count | FiniteFloat
    text: str  # the cost as tables print it


@dataclass(frozen=True)
class Row:
    """One model, measured on the report split.

    Attributes:
        label: what the row is called, e.g. ``"uniform + ridge"``.
        perplexity: exp of the mean loss; infinite or NaN where the model broke.
        loss_stderr: standard error of the mean loss over the windows, in nats per token; ``None`` where unknown.
        sparsity_prunable: share of the budget's resource removed over the prunable sublayers, in [0, 1].
        sparsity_model: share of the same resource removed over the whole model, in [0, 1].
        costs: what the whole model costs; the same resources in all rows of a table, parameters first.
        losses: nats per token of each window; empty where they were not kept.
        note: what a reader must know about this row alone, without a full stop; empty for nothing.
        is_heuristic: a rule gave the allocation, without any episode.
        is_found: the row holds the allocation that the agent found.
        refit: how it was refitted, e.g. ``"ridge"``; empty for not at all.
        same_as: label of the heuristic that keeps the very same units, where the agent found no others.
    """

    label: str
    perplexity: float
    loss_stderr: float | None
    sparsity_prunable: float
    sparsity_model: float
    costs: tuple[Cost, ...]
    losses: tuple[float, ...] = field(default=(), repr=False)
    note: str = ""
    is_heuristic: bool = False
    is_found: bool = False
    is_saved: bool = False
    refit: str = ""
    same_as: str = ""

    @property
    def values(self) -> dict[str, float]:
        """The costs by resource."""
        return {cost.key: cost.value for cost in self.costs}

    @property
    def perplexity_text(self) -> str:
        """Its perplexity as tables print it."""
        return perplexity_text(self.perplexity)

    @property
    def parameters(self) -> float:
        """Parameters of the whole model."""
        return self.costs[0].value

    @property
    def is_dense(self) -> bool:
        """Nothing was removed."""
        return self.sparsity_prunable == 0


@dataclass(frozen=True)
class ReportTable:
    """Rows measured alike, and the sentence that says how.

    Attributes:
        rows: the dense model's first.
        header: how the perplexities were measured.
        windows: digest of the windows that all rows were measured on; empty where it is not known.
        has_objectives: the search was rewarded for other aims than a low perplexity, too.
    """

    rows: tuple[Row, ...]
    header: str
    windows: str = ""
    has_objectives: bool = False

    def __repr__(self) -> str:
        return f"<ReportTable: {', '.join(f'{row.label} {row.perplexity_text}' for row in self.rows)}>"

    def _repr_markdown_(self) -> str:
        return self.layout().markdown()

    @property
    def dense(self) -> Row:
        """The dense model's row."""
        return self.rows[0]

    @property
    def best(self) -> Row | None:
        """The pruned row of lowest finite perplexity; the first of equals; ``None`` if there is no such row."""
        return _lowest(row for row in self.rows if not row.is_dense)

    @property
    def best_heuristic(self) -> Row | None:
        """The heuristic of lowest finite perplexity; ``None`` if there is none."""
        return _lowest(row for row in self.rows if row.is_heuristic)

    @property
    def saved(self) -> Row:
        """The row whose model the run saved after its last refit."""
        return next((row for row in self.rows if row.is_saved), self.rows[-1])

    @property
    def result(self) -> Row:
        """The run's result: the saved model, after training where it was trained."""
        return next((row for row in reversed(self.rows) if row.is_saved), self.rows[-1])

    def times_dense(self, row: Row) -> float | None:
        """A row's perplexity over the dense model's; ``None`` where it is no number."""
        ratio = row.perplexity / self.dense.perplexity
        return None if math.isnan(ratio) else ratio

    def difference(self, row: Row) -> Difference | None:
        """A pruned row against the best heuristic on the same windows; ``None`` where that is not known."""
        best = self.best_heuristic
        if best is None or row is best or row.is_dense or not (row.losses and best.losses):
            return None
        return paired_difference([row.losses], [best.losses])

    @property
    def verdict(self) -> list[str]:
        """Sentences that say whether the search found anything better than a heuristic, like compared with like."""
        best = self.best_heuristic
        found = next((row for row in self.rows if row.is_found and best is not None and row.refit == best.refit), None)
        if best is None or found is None:
            return []
        if found.same_as:
            who, rule = (label.removesuffix(f" + {found.refit}") for label in (found.label, found.same_as))
            return [f"The result is a heuristic itself: {who} found the same allocation as {rule}."]
        difference = self.difference(found)
        if difference is None:
            return []
        rule = f"the best heuristic, {best.label.removesuffix(f' + {best.refit}')}"
        if not math.isfinite(difference.margin):
            return [f"One window cannot say whether {found.label} is better than {rule}."]
        if difference.is_same:
            return [f"{found.label} is the same model as {rule}."]
        nats = f"{difference.figures} nats per token (95 % interval, {len(found.losses)} windows)."
        alone = "By perplexity alone, " if self.has_objectives else ""
        if difference.is_tie:
            return [f"{alone}{found.label} ties with {rule}: {nats}"]
        word = "better" if difference.mean < 0 else "worse"
        return [f"{alone}{found.label} is {word} than {rule}, by {nats.lstrip('+-')}"]

    @property
    def warning(self) -> str | None:
        """Why the result should not be used; ``None`` where nothing speaks against it."""
        ratio = self.times_dense(self.result)
        if ratio is not None and ratio < DESTROYED:
            return None
        return (
            f"The pruned model is destroyed: its perplexity is {self.result.perplexity_text}, where the dense model "
            f"has {self.dense.perplexity_text}. Remove less (--sparsity), or train it afterwards (ffgym recover)."
        )

    def layout(self) -> Table[Row]:
        """What stands where; a console shows it down to 80 columns, also without colours."""
        best, best_heuristic = self.best, self.best_heuristic
        columns: list[Column[Row]] = [
            label_column(lambda row: row.label, bold=True),
            numeric(
                "perplexity",
                lambda row: (
                    row.perplexity_text
                    + (STAR if best and not row.is_dense and row.perplexity == best.perplexity else "")
                ),
                lambda row: {"perplexity": row.perplexity, "loss_stderr": row.loss_stderr},
                bold=True,
            ),
            numeric("x dense", self._times_dense, lambda row: {"ratio_to_dense": self.times_dense(row)}),
            *difference_columns(
                self.rows, "best heuristic", self.difference, lambda row: "best heuristic" * (row is best_heuristic)
            ),
            _share("sparsity prunable", lambda row: row.sparsity_prunable),
            _share("sparsity model", lambda row: row.sparsity_model),
            *(_cost(index, cost.column) for index, cost in enumerate(self.rows[0].costs)),
        ]
        return Table(
            columns,
            self.rows,
            [*self.verdict, *self._refit_notes(), self.warning or "", *self._legend(), self.header],
            is_bold=lambda row: row.is_saved,
            is_reference=lambda row: row.is_dense,
            caption="In every pruned row",
            plain=lambda row: {
                "costs": row.values,
                "note": row.note,
                "refit": row.refit,
                "same_as": row.same_as,
                "is_dense": row.is_dense,
                "is_heuristic": row.is_heuristic,
                "is_found": row.is_found,
                "is_saved": row.is_saved,
                "is_best": row is best,
            },
        )

    def _times_dense(self, row: Row) -> str:
        ratio = self.times_dense(row)
        return "" if row.is_dense or ratio is None else f"{ratio:,.2f}"

    def _refit_notes(self) -> list[str]:
        """Say so where the saved refit is clearly worse than none."""
        plain, saved = next((row for row in self.rows if row.is_found and not row.refit), None), self.saved
        if plain is None or not (plain.losses and saved.losses):
            return []
        found = paired_difference([saved.losses], [plain.losses])
        if found is None or found.mean <= 0 or found.is_tie:
            return []
        return [
            f"The refit that is saved made the result worse: {plain.label} has the lower loss. Calibrate on more text "
            "(data.calibration_tokens), or on the kind of text that the model will read (data.calibration)."
        ]

    def _legend(self) -> list[str]:
        """Explain the signs that the table uses, and only those; then the rows' notes."""
        looks = ["* lowest perplexity of the pruned rows."] if self.best is not None else []
        if saved := sum(row.is_saved for row in self.rows):
            looks.append(f"Bold: the saved model{'s' * (saved > 1)}.")
        signs = [" ".join(looks)]
        if any(self.difference(row) for row in self.rows):
            signs.append(f"Nats per token against the best heuristic on the same windows, {MARGIN}; {SIGN}")
        return [*signs, *(f"{row.label}: {row.note}." for row in self.rows if row.note)]


def _lowest(rows: Iterable[Row]) -> Row | None:
    numbers = (row for row in rows if math.isfinite(row.perplexity))
    return min(numbers, key=lambda row: row.perplexity, default=None)


def _share(head: str, share: Callable[[Row], float]) -> Column[Row]:
    return numeric(
        head,
        lambda row: "" if row.is_dense else f"{share(row):.1%}",
        lambda row: {head.replace(" ", "_"): share(row)},
        spare=True,
    )


def _cost(index: int, head: str) -> Column[Row]:
    return numeric(head, lambda row: row.costs[index].text, lambda _: {}, spare=True)


def bos_text(bos: Bos) -> str:
    """Say which windows begin with BOS."""
    return {"every": "BOS before every window", "first": "BOS before the first window alone", "none": "without BOS"}[
        bos
    ]


def perplexity_text(perplexity: float) -> str:
    """Write a perplexity with two decimals."""
    if not math.isfinite(perplexity):
        return "NaN" if math.isnan(perplexity) else "inf"
    return f"{perplexity:.2e}" if perplexity >= 1e5 else f"{perplexity:,.2f}"
