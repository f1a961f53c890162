"""``ffgym runs``, ``sync`` and ``ui``: what MLflow has of runs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from ffgym.cli.app import app
from ffgym.cli.options import ExperimentOption, JsonOption, RootOption
from ffgym.cli.printing import print_columns, print_json
from ffgym.config.tables import TrackingTable
from ffgym.errors import ConfigError, TrackingError, UnknownNameError
from ffgym.tracking.runs import ID_CHARACTERS, TrackedRun, list_runs

COLUMNS = {
    "id": f"{{:.{ID_CHARACTERS}}}",
    "name": "{}",
    "status": "{}",
    "started": "{:%Y-%m-%d %H:%M}",
    "agent": "{}",
    "criterion": "{}",
    "seed": "{}",
    "model": "{}",
    "sparsity": "{:.1%}",
    "result": "{}",
    "ratio": "{:.3f}",
    "tokens": "{:,}",
}
"""The columns, and how a value of each is shown."""
HEADS = {"ratio": "x dense"}


@app.command()
def runs(
    place: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="only the runs whose folders lie there", show_default=False)
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="COLUMN=VALUE", help="show only runs with this value, e.g. agent=rein*; repeatable"
        ),
    ] = None,
    sort: Annotated[str, typer.Option(help="column to sort by; -COLUMN for the other way round")] = "-started",
    root: RootOption = TrackingTable().root,
    experiment: ExperimentOption = TrackingTable().experiment,
    as_json: JsonOption = False,
) -> None:
    """List the runs that were tracked.

    ffgym runs --sort result --filter status=finished
    """
    column = _column(sort.removeprefix("-"))
    wanted = [_condition(text) for text in filters or []]
    found = [
        run
        for run in list_runs(Path(root).expanduser(), experiment)
        if (place is None or (run.folder is not None and run.folder.is_relative_to(place.expanduser().resolve())))
        and all(_matches(run, column, value) for column, value in wanted)
    ]
    known = [run for run in found if not _is_missing(getattr(run, column))]
    known.sort(key=lambda run: getattr(run, column), reverse=sort.startswith("-"))
    found = [*known, *(run for run in found if _is_missing(getattr(run, column)))]
    if as_json:
        print_json([{**asdict(run), "started": run.started.isoformat()} for run in found])
    elif found:
        print_columns(
            [[HEADS.get(key, key) for key in COLUMNS], *([_cell(run, key) for key in COLUMNS] for run in found)]
        )
    else:
        where = "" if place is None else f" with folders in {place}"
        typer.echo(f"no tracked runs{where}{' pass the filters' if wanted else ''}", err=True)


def _is_missing(value: Any) -> bool:
    """Whether a run has no such value, or one that is no number because its model broke."""
    return value is None or value != value


def _column(name: str) -> str:
    if name not in COLUMNS:
        raise UnknownNameError("column", name, COLUMNS)
    return name


def _condition(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"cannot read --filter {text!r}", hint="Write COLUMN=VALUE, e.g. --filter agent=reinforce")
    return _column(key.strip()), value.strip()


def _matches(run: TrackedRun, column: str, wanted: str) -> bool:
    """Whether a value is what is wanted: by a pattern, in full or as shown, or a number to the decimals typed.

    A run's sparsity is the one that it reached and the one that it was asked for.
    """
    value = getattr(run, column)
    if isinstance(value, int | float):
        with suppress(ValueError):
            number, decimals = float(wanted), len(wanted.partition(".")[2])
            values = [value, value if column != "sparsity" or run.target is None else run.target]
            return any(round(each, decimals) == number for each in values)
    texts = {"" if value is None else str(value), _cell(run, column)} - {""}
    return any(fnmatch(text.lower(), wanted.lower()) for text in texts)


def _cell(run: TrackedRun, column: str) -> str:
    value = getattr(run, column)
    if column == "sparsity" and run.sparsity_range is not None:
        return run.sparsity_range
    if value is None:
        return ""
    if column == "agent" and (count := value.count(", ") + 1) > 2:  # of a bench; one long cell would widen all lines
        return f"{count} agents"
    if isinstance(value, datetime):
        value = value.astimezone()  # local time, which the names of runs show too
    if column == "result":
        from ffgym.report.table import perplexity_text

        value = perplexity_text(value)
    return COLUMNS[column].format(value)


@app.command()
def sync(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="where runs keep their files", show_default="runs and the store's folder"),
    ] = None,
    root: RootOption = TrackingTable().root,
) -> None:
    """Send what runs kept on disk because their MLflow store could not be written."""
    from ffgym.tracking.outbox import sync as send_all

    store, named = Path(root).expanduser(), [folder.expanduser() for folder in folders or []]
    if missing := next((folder for folder in named if not folder.is_dir()), None):
        raise TrackingError(f"there is no folder {missing}", hint="Name the folder of a run, or of several.")
    if not send_all(store, named or [Path("runs"), store], typer.echo):
        typer.echo("nothing is waiting to be sent", err=True)


@app.command()
def ui(
    root: RootOption = TrackingTable().root,
    experiment: ExperimentOption = TrackingTable().experiment,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 5000,
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
) -> None:
    """Open the MLflow page of the runs that were tracked, best result first."""
    from ffgym.tracking.ui import open_ui

    open_ui(Path(root).expanduser(), experiment, port, notify=typer.echo, browser=browser)
