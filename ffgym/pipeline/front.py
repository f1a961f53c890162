"""The front of a run over a range of budgets: every point and the rules, measured on the report split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ffgym.pipeline.compare import (
    compared_rows,
    found_name,
    heuristic_allocations,
    measured_row,
    refit_name,
    target_model_folder,
    with_result,
)
from ffgym.pipeline.task import Task, at_target, cut_to
from ffgym.report.front import Front, FrontPoint
from ffgym.report.progress import Reporter
from ffgym.report.table import ReportTable
from ffgym.search.loop import SearchResult


def finish_front(
    task: Task, points: Sequence[SearchResult], table: ReportTable, folder: Path, reporter: Reporter
) -> Front:
    """Measure every point of a front and the rules on the report split; save the models that are wanted.

    The main target's table is there already.
    """
    config, name, refitted = task.config, found_name(task.config), refit_name(task.config)
    measured = []
    for found in points:
        rows = {row.label: row for row in table.rows}
        point = at_target(task, found.target)
        references = heuristic_allocations(point)
        if found.target != config.main_target:
            reporter.print(f"target {found.target:.1%}")
            if config.output.save_all:
                own = compared_rows(point, references, {}, found, reporter, rows["dense"])
                full, _ = with_result(point, own, found, reporter, target_model_folder(config, folder, found.target))
                rows = {row.label: row for row in full.rows}
            else:
                for label, allocation in {**references, name: found.best.allocation}.items():
                    with cut_to(point, allocation.kept):
                        place = f"{label} + {refitted}"
                        rows[place] = measured_row(point, place, reporter, refit=refitted, is_found=label == name)
        measured.append(
            FrontPoint(
                target=found.target,
                found=rows[f"{name} + {refitted}"],
                references={label: rows[f"{label} + {refitted}"] for label in references},
                allocation=found.best.allocation,
                origin=found.best.origin,
                finals_loss=found.best.loss,
            )
        )
    return Front(
        label=name,
        points=tuple(measured),
        dense=table.dense,
        header=table.header,
        search_tokens=points[0].search_tokens,
        final_tokens=sum(found.final_tokens for found in points),
        seconds=points[0].seconds + sum(found.final_seconds for found in points[1:]),
    )
