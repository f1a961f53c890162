"""What stored searches found, measured on another report text.

    python experiments/bench/second_text.py demo:technical experiments/bench/final-*.toml > technical.md

Cuts and refits the model to each stored allocation and prints a Markdown table a bench. Nothing is searched again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.console import Console

from ffgym.bench.cell import CELL_RESULT
from ffgym.bench.file import read_bench
from ffgym.bench.table import BenchTable, bench_table
from ffgym.pipeline.task import on_report, open_task
from ffgym.report.progress import Reporter

LEFT_OUT = ("tokens", "seconds")  # of the search, which is not repeated


def measured(file: Path, text: str, reporter: Reporter) -> BenchTable:
    """The bench's table with losses on the report split of ``text``."""
    bench = read_bench(file)
    done = sorted((cell for cell in bench.cells if cell.path.exists()), key=lambda cell: cell.preparation)
    results = []
    for _, group in groupby(done, key=lambda cell: cell.preparation):
        cells = list(group)
        config = cells[0].config
        config = config.model_copy(update={"data": config.data.model_copy(update={"report": text})})
        task = open_task(config, [], reporter)
        dense = on_report(task, task.prepared.prunable.dense_units).loss
        with reporter.stage(", ".join(sorted({cell.label for cell in cells})), len(cells)) as stage:
            for cell in cells:
                result = CELL_RESULT.read(cell.path)
                found = on_report(task, result.final.kept)
                final = result.final.model_copy(update={"loss": found.loss, "losses": list(found.losses)})
                settings = {**result.settings, "data": {**result.settings["data"], "report": text}}
                changes = {"settings": settings, "dense_loss": dense, "final": final}
                results.append(result.model_copy(update=changes))
                stage.advance()
    return bench_table(bench.spec.title, results, baselines=bench.spec.baseline)


def shown(table: BenchTable) -> str:
    """The table as Markdown, without what a search costs."""
    layout = table.layout()
    columns = [column for column in layout.columns if not column.head.startswith(LEFT_OUT)]
    return f"# {table.title}\n\n{table.header}\n\n{replace(layout, columns=columns).markdown()}"


if __name__ == "__main__":
    reporter = Reporter(Console(stderr=True))
    print("\n\n".join(shown(measured(Path(file), sys.argv[1], reporter)) for file in sys.argv[2:]))
