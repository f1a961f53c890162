"""``ffgym compare`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import ExperimentOption, JsonOption, RootOption
from ffgym.cli.printing import print_json
from ffgym.config.tables import TrackingTable
from ffgym.files import OUTPUT_OPTION, check_writable, write_text


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="folders, names or ids of runs; the first one is what the others are compared with",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="folder for the table and the picture")] = Path("comparison"),
    root: RootOption = TrackingTable().root,
    experiment: ExperimentOption = TrackingTable().experiment,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs window by window, in a table and a picture.

    Example: ffgym compare runs/one runs/other --output comparison
    """
    from rich.console import Console

    from ffgym.pipeline.stored import compare_runs, stored_run
    from ffgym.report.comparison import differences_figure

    if len(runs) < 2:
        raise typer.BadParameter("name at least two runs", param_hint="RUN")
    output = output.expanduser()
    found = compare_runs([stored_run(run, Path(root).expanduser(), experiment) for run in runs])
    check_writable(output / "comparison.md", OUTPUT_OPTION)
    table = found.layout()
    write_text(output / "comparison.md", table.markdown())
    written = ["comparison.md"]
    differences = [(run.name, difference) for run in found.runs if (difference := found.difference(run)) is not None]
    if differences:
        differences_figure(differences, found.reference.name, output / "differences.png")
        written.append("differences.png")
    else:  # one of an earlier comparison in this folder would be taken for this one's
        (output / "differences.png").unlink(missing_ok=True)
    if as_json:
        print_json({"runs": table.as_dicts(), "notes": table.notes, "files": [str(output / name) for name in written]})
        return
    console = Console()
    console.print(table)
    console.print(f"Written to {output}: {', '.join(written)}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def report(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|BENCH", help="folder, name or id of a run, or a bench file", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="HTML file to write", show_default="report.html in the run, or beside the bench"),
    ] = None,
    root: RootOption = TrackingTable().root,
    experiment: ExperimentOption = TrackingTable().experiment,
) -> None:
    """Write one HTML page about a run or a bench: table, pictures, how to load the model, how to repeat it.

    Example: ffgym report runs/one
    """
    from ffgym.bench.page import bench_page
    from ffgym.files import check_file
    from ffgym.pipeline.page import run_page
    from ffgym.pipeline.stored import stored_run
    from ffgym.report.page import write_page

    if Path(what).suffix == ".toml":
        page, place = bench_page(Path(what).expanduser()), Path(what).expanduser().with_suffix(".html")
    else:
        run = stored_run(what, Path(root).expanduser(), experiment)
        page, place = run_page(run), run.folder / "report.html"
    place = place if output is None else output.expanduser()
    check_file(place, (".html",), overwrite=True)
    write_page(page, place)
    typer.echo(str(place))
