"""``ffgym ls`` and ``plugins``: the names of plugins, and the packages that they come from."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption
from ffgym.cli.printing import print_columns, print_json
from ffgym.plugins import manager
from ffgym.plugins.kinds import KINDS

_PLURALS = {kind.plural: name for name, kind in KINDS.items()}
Kinds = StrEnum("Kinds", list(_PLURALS))  # type: ignore[misc]


@app.command("ls")
def list_names(
    kind: Annotated[Kinds, typer.Argument(help="what to list", show_default=False)], as_json: JsonOption = False
) -> None:
    """List the names of a kind of plugin, built-in and installed, each with what it is."""
    found = manager.names(_PLURALS[kind])
    if as_json:
        print_json([{"name": name, "description": line} for name, line in found.items()])
    else:
        print_columns(found.items())
    if broken := [record.name for record in manager.records() if record.failure is not None]:
        typer.echo(f"plugins that could not be loaded: {', '.join(broken)}; `ffgym plugins` says why", err=True)


@app.command()
def plugins(as_json: JsonOption = False) -> None:
    """List the installed plugins: what each provides, and why it could not be loaded."""
    records = manager.records()
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = []
    for record in records:
        provides = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in record.provides.items())
        remark = provides if record.failure is None else f"FAILED {record.failure}"
        rows.append((record.name, f"{record.package} {record.version}".strip(), remark))
    print_columns(rows)
