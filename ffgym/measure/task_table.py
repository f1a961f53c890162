"""The table of ``ffgym eval``: tasks down, models across, every figure with its standard error.

One :class:`TaskTable`: its columns, for the terminal and for Markdown, and :func:`as_dict` for ``--json`` and files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ffgym.measure.task_definitions import TaskSet
from ffgym.measure.tasks import Figure, ModelScores, paper_means
from ffgym.report.layout import Column, Table, strict
from ffgym.report.paired import MARGIN, SIGN, Difference, difference_data, paired_difference
from ffgym.report.table import perplexity_text
from ffgym.types import JSONDict

if TYPE_CHECKING:
    from ffgym.measure.texts import TextLosses

MEAN_LABEL = "mean of the paper's seven"
DIFFERENCE = "difference"


@dataclass(frozen=True)
class TaskTable:
    """Models measured alike on the same examples, and how."""

    models: tuple[ModelScores, ...]  # at least one, in the order asked for
    tasks: TaskSet
    limit: int | None  # examples a task; None where all were measured
    complete: bool = True  # nothing is missing; False after an interruption

    def layout(self) -> Table[Line]:
        """What stands where; two models fit into 80 columns of a console, and of more the figures take two lines."""
        from rich.text import Text

        lines = _lines(self)
        task = min(14, max(len(line.task) for line in lines)) if lines else None
        metric = min(10, max(len("metric"), *(len(line.metric) for line in lines))) if lines else None
        columns: list[Column[Line]] = [
            Column("task", lambda line: line.task, left=True, once=True, look={"width": task, "overflow": "fold"}),
            Column("metric", lambda line: line.metric, left=True, look={"width": metric}),
            Column("split", lambda line: line.split, left=True, once=True, look={"no_wrap": True}),
            Column("examples", lambda line: line.examples, once=True, look={"no_wrap": True}),
            *(
                Column(model.name, partial(_at, index), console_head=Text(model.name, overflow="fold"))
                for index, model in enumerate(self.models)
            ),
        ]
        return Table(columns, lines, _notes(self), is_bold=lambda line: line.task == MEAN_LABEL)


@dataclass(frozen=True)
class Line:
    """One row: a figure of a task, one cell a model."""

    task: str
    metric: str
    split: str
    examples: str
    cells: tuple[str, ...]


def _lines(table: TaskTable) -> list[Line]:
    """All rows; a task that no model has finished is left out."""
    lines: list[Line] = []
    finished = [{result.task: result for result in model.results} for model in table.models]
    for task in table.tasks.tasks:
        results = [by_task.get(task.name) for by_task in finished]
        known = next((result for result in results if result is not None), None)
        if known is None:
            continue
        for metric in known.metrics:
            cells = tuple(_cell(None if result is None else result.metric(metric.name)) for result in results)
            lines.append(Line(task.name, metric.name, known.split, f"{known.examples:,}", cells))
        if known.text is not None and len(results) > 1:
            differences = tuple("-" if each is None else str(each) for each in _differences(table, task.name))
            lines.append(Line(task.name, DIFFERENCE, known.split, f"{known.examples:,}", differences))
    means = [{mean.name: mean for mean in paper_means(model.results)} for model in table.models]
    labels = dict.fromkeys(label for mean in means for label in mean)
    lines.extend(Line(MEAN_LABEL, label, "", "", tuple(_cell(mean.get(label)) for mean in means)) for label in labels)
    return lines


def _differences(table: TaskTable, text: str) -> list[Difference | None]:
    """Each model's from the first one on the same windows of a text; ``None`` where there is none."""
    losses = _losses(table, text)
    first = losses[0]
    return [
        paired_difference([each.losses], [first.losses])
        if each is not None and first is not None and each is not first and each.digest == first.digest
        else None
        for each in losses
    ]


def _losses(table: TaskTable, text: str) -> list[TextLosses | None]:
    return [next((each.text for each in model.results if each.task == text), None) for model in table.models]


def _at(model: int, line: Line) -> str:
    return line.cells[model]


def _cell(metric: Figure | None) -> str:
    """Four decimals, as lm-eval prints them, and the standard error where there is one; powers of ten where huge."""
    if metric is None:
        return "-"
    if not math.isfinite(metric.value) or metric.value >= 1e5:
        return perplexity_text(metric.value)  # a destroyed model's
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")


def _notes(table: TaskTable) -> list[str]:
    """Say how it was measured, and what a reader must know about single figures."""
    notes = ["± one standard error over examples."]
    if table.tasks.harness:
        notes = [
            f"Zero-shot, lm-eval {table.tasks.harness} with its own task definitions. {notes[0]}",
            f"Data: {table.tasks.origin}.",
        ]
    texts = [result.text for model in table.models for result in model.results if result.text is not None]
    if texts:
        windows = " or ".join(f"{window:,}" for window in sorted({text.window for text in texts}))
        notes.append(f"The examples of a text are windows of {windows} tokens.")
    if texts and len(table.models) > 1:
        notes.append(f"{DIFFERENCE}: from {table.models[0].name} on the same windows, nats per token, {MARGIN}; {SIGN}")
    if table.limit is not None and len(texts) < sum(len(model.results) for model in table.models):
        notes.append(f"Only the first {table.limit:,} examples of each task: for a quick look, not for comparison.")
    if not table.complete:
        notes.append("Interrupted: some figures are missing.")
    for task in table.tasks.tasks:
        if task.split != task.own_split:
            notes.append(
                f"{task.name}: measured on {task.split}, while lm-eval's own figure is of {task.own_split},"
                " which the wheel lacks."
            )
    for model in table.models:
        notes.append(f"{model.name}: {model.description}, {model.dtype} on {model.device}.")
        for result in model.results:
            if result.not_finite:
                notes.append(
                    f"{model.name}, {result.task}: {result.not_finite:,} log-likelihoods are not finite; the model is"
                    " broken, and the figures mean nothing."
                )
            if result.uses:
                notes.append(
                    f"{result.task} is what {model.name} was {' and '.join(result.uses)} on: it looks better there"
                    " than on other text."
                )
            if result.text is not None and len({text.digest for text in _losses(table, result.task) if text}) > 1:
                notes.append(f"{result.task}: windows differ, by tokenizer or context, so perplexities do not compare.")
            if result.truncated:
                notes.append(
                    f"{model.name}, {result.task}: {result.truncated:,} requests were longer than the model's context"
                    " and lost their beginning."
                )
    return list(dict.fromkeys(notes))


def as_dict(table: TaskTable) -> JSONDict:
    """The table as plain data, see `strict`."""
    data = {
        "lm_eval": table.tasks.harness or None,
        "num_fewshot": 0,
        "data": table.tasks.source,
        "data_origin": table.tasks.origin,
        "limit": table.limit,
        "complete": table.complete,
        "models": [_model_dict(table, index) for index in range(len(table.models))],
    }
    return strict(data)


def _model_dict(table: TaskTable, index: int) -> JSONDict:
    own_splits = {task.name: task.own_split for task in table.tasks.tasks}
    model = table.models[index]
    return {
        "name": model.name,
        "description": model.description,
        "dtype": model.dtype,
        "device": model.device,
        "tasks": {
            result.task: {
                "version": result.version,
                "split": result.split,
                "lm_eval_split": own_splits[result.task],
                "examples": result.examples,
                "available": result.available,
                "truncated": result.truncated,
                "not_finite": result.not_finite,
                "metrics": _figures(result.metrics),
            }
            for result in model.results
            if result.text is None
        },
        "texts": {
            result.task: {
                "split": result.split,
                "window": result.text.window,
                "windows": result.text.digest,
                "uses": result.uses,
                "losses": result.text.losses,
                "metrics": _figures(result.metrics),
                **difference_data(_differences(table, result.task)[index]),
            }
            for result in model.results
            if result.text is not None
        },
        "paper_means": _figures(paper_means(model.results)),
    }


def _figures(figures: Iterable[Figure]) -> JSONDict:
    return {figure.name: {"value": figure.value, "stderr": figure.stderr} for figure in figures}


def _json(table: TaskTable) -> str:
    return json.dumps(as_dict(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FILE_KINDS: dict[str, Callable[[TaskTable], str]] = {".json": _json, ".md": lambda table: table.layout().markdown()}
