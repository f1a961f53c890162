"""What stored searches found, measured on another report text.

    python experiments/bench/second_text.py demo:technical experiments/bench/final-*.toml --output technical.md

Cuts and refits the model to each stored allocation. Nothing is searched again. The output is a Markdown table a bench,
and beside it a JSON file with the loss of every window (nats per token) that the table is made of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.console import Console

from ffgym.bench.cell import CELL_RESULT
from ffgym.bench.file import read_bench
from ffgym.bench.table import BenchTable, CellResult, bench_table
from ffgym.errors import FFGymError
from ffgym.pipeline.task import on_report, open_task
from ffgym.report.progress import Reporter

LEFT_OUT = ("tokens", "seconds")  # of the search, which is not repeated


def measured(file: Path, text: str, reporter: Reporter) -> tuple[BenchTable, list[CellResult]]:
    """The bench's table, and its results, with losses on the report split of ``text``."""
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
                changes = {"settings": settings, "dense_loss": dense, "dtype": task.loaded.dtype_name, "final": final}
                results.append(result.model_copy(update=changes))
                stage.advance()
    return bench_table(bench.spec.title, results, baselines=bench.spec.baseline), results


def shown(table: BenchTable) -> str:
    """The table as Markdown, without what a search costs."""
    layout = table.layout()
    columns = [column for column in layout.columns if not column.head.startswith(LEFT_OUT)]
    return f"# {table.title}\n\n{table.header}\n\n{replace(layout, columns=columns).markdown()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every bench, then write the tables and the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", help="corpus whose report split is measured, e.g. demo:technical")
    parser.add_argument("files", type=Path, nargs="+", help="bench files")
    parser.add_argument("--output", type=Path, required=True, help="the tables; the losses go beside them, as .json")
    given = parser.parse_args(arguments)
    reporter, tables, losses = Reporter(Console(stderr=True)), [], {}
    try:
        for file in given.files:
            table, results = measured(file, given.text, reporter)
            tables.append(shown(table))
            losses[file.stem] = {
                f"{result.label}-seed{result.seed}": [round(loss, 6) for loss in result.final.losses]
                for result in results
            }
    except FFGymError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    given.output.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    given.output.with_suffix(".json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
