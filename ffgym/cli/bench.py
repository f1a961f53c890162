"""``ffgym bench``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption
from ffgym.cli.printing import print_json

if TYPE_CHECKING:
    from ffgym.bench.table import BenchTable


@app.command()
def bench(
    files: Annotated[list[Path] | None, typer.Argument(help="bench files (TOML)", show_default=False)] = None,
    only_report: Annotated[bool, typer.Option("--report", help="compute nothing, show the results so far")] = False,
    workers: Annotated[
        int,
        typer.Option("--workers", "--jobs", min=1, help="searches at the same time; more than 1 need the extra 'ray'"),
    ] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT", show_default="this machine")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run many searches on equal terms and compare them; earlier results are kept."""
    from ffgym.bench.bench import CellsError
    from ffgym.bench.bench import bench as run_bench

    if not files:
        raise typer.BadParameter("name at least one bench file, e.g. experiments/bench/sparsity-20.toml")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tables = run_bench(files, only_report=only_report, workers=workers, ray_address=ray_address)
    except KeyboardInterrupt:
        typer.echo(
            "finished episodes are kept: the same command continues, --report shows the results so far", err=True
        )
        raise
    except CellsError as error:
        _show(error.tables, as_json)
        raise
    _show(tables, as_json)


def _show(tables: Sequence[BenchTable], as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print_json(
            [
                {"title": table.title, "header": table.header, "rows": table.layout().as_dicts(), "files": table.files}
                for table in tables
            ]
        )
        return
    console = Console()
    for table in tables:
        console.print(f"\n{table.title}", style="bold", highlight=False, markup=False)
        console.print(table.header, highlight=False, markup=False)
        console.print(table.layout())
