"""``ffgym ls`` and ``plugins``: the names of plugins, and the packages that they come from."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption
from ffgym.cli.printing import print_columns, print_json
from ffgym.config.mixture import EXAMPLE
from ffgym.errors import UnknownNameError
from ffgym.plugins import manager
from ffgym.plugins.kinds import KINDS
from ffgym.plugins.template import OPTIONS, NewKind, write_package
from ffgym.report.layout import Column, Table
from ffgym.types import PluginRecord

_PLURALS = {kind.plural: name for name, kind in KINDS.items()}


@app.command("ls")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help=", ".join(_PLURALS), show_default="the names of all kinds")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the names of a kind of plugin, built-in and installed, each with what it is."""
    if kind is not None and kind not in _PLURALS:
        unknown = UnknownNameError("kind", kind, _PLURALS)
        raise typer.BadParameter(f"{unknown.message}. {unknown.hint}", param_hint="KIND")
    if kind is None:
        names = {plural: list(manager.names(name)) for plural, name in _PLURALS.items()}
        if as_json:
            print_json(names)
        else:
            print_columns((plural, ", ".join(found)) for plural, found in names.items())
    elif as_json:
        print_json([{"name": name, "description": line} for name, line in manager.names(_PLURALS[kind]).items()])
    else:
        print_columns(manager.names(_PLURALS[kind]).items())
        if kind == "corpora":
            typer.echo(f"A corpus is also a file, a folder or a hub id; a list of corpora is a mixture: {EXAMPLE}")
    failed = [record for record in manager.records() if record.failure is not None]
    for what, which in (
        ("plugins that could not be loaded", [record.name for record in failed if not record.provides]),
        ("not used, because another plugin has the same name", [record.name for record in failed if record.provides]),
    ):
        if which:
            typer.echo(f"{what}: {', '.join(which)}; `ffgym plugins` says why", err=True)


@app.command()
def new(
    kind: Annotated[NewKind, typer.Argument(help="what to write", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="what it is called", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="where its folder is made")] = Path(),
) -> None:
    """Write a plugin's package, which installs, passes its conformance test and runs, for you to change.

    ffgym new criterion my-criterion
    """
    folder = write_package(kind, name, output.expanduser())
    typer.echo(f"{folder} has {'an' if kind == 'agent' else 'a'} {kind} that works. Install it, test it, run it:\n")
    place = shlex.quote(str(folder))
    install, test = f"pip install --editable {place} pytest", f"python -m pytest {place}"
    for command in (install, test, f"ffgym run {OPTIONS[kind]} {name}"):
        typer.echo(f"  {command}")


@app.command()
def plugins(
    traceback: Annotated[
        str | None,
        typer.Option(
            "--traceback", metavar="NAME", help="print where this plugin failed while it was loaded", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed plugins: what each provides, and why it could not be loaded or is not used."""
    from rich.console import Console

    if traceback is not None:
        typer.echo(manager.traceback_of(traceback))
        return
    records = manager.records()
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [row for record in records for row in _rows(record)]
    heads = ("plugin", "package", "kind", "provides")
    look = {"overflow": "fold"}
    columns = [Column(head, itemgetter(i), left=True, once=i < 2, look=look) for i, head in enumerate(heads)]
    notes = [f"{record.name} {_state(record)}: {record.failure}" for record in records if record.failure is not None]
    if any(record.failure is not None and not record.provides for record in records):
        notes.append("`ffgym plugins --traceback NAME` shows where.")
    Console().print(Table(columns, rows, notes))


def _rows(record: PluginRecord) -> list[tuple[str, str, str, str]]:
    """What a record provides, a row for each kind, and one that says so where not all of it can be used."""
    package = f"{record.package} {record.version}".strip()
    rows = [(record.name, package, kind, ", ".join(names)) for kind, names in record.provides.items()]
    return rows if record.failure is None else [*rows, (record.name, package, _state(record), "")]


def _state(record: PluginRecord) -> str:
    """What a failure means: that nothing was loaded, or that something else has the name of what was."""
    return "NAME TAKEN" if record.provides else "FAILED"
