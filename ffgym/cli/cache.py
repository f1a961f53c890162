"""``ffgym cache``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption
from ffgym.cli.printing import print_columns, print_json
from ffgym.report.layout import humane


@app.command()
def cache(
    delete: Annotated[
        list[str] | None, typer.Option("--delete", metavar="NAME", help="delete an entry, or all of a kind; repeatable")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what ffgym keeps on disk: prepared models, fetched assets, converted models, latency tables.

    Prepared models take at most FFGYM_CACHE_SIZE (50GB): the least recently used are deleted first.
    """
    from ffgym.data.cache import cache_dir, entries, remove
    from ffgym.errors import AssetError, UnknownNameError

    found = entries()
    for name in delete or []:
        chosen = [entry for entry in found if name in (entry.kind, entry.path.name)]
        if not chosen:
            known = sorted({entry.kind for entry in found} | {entry.path.name for entry in found})
            raise UnknownNameError("cache entry", name, known)
        for entry in chosen:
            if not remove(entry):
                raise AssetError(
                    f"{entry.path} is being made or opened by another process", hint="Delete it when that is done."
                )
            typer.echo(f"deleted {entry.path}", err=True)
        found = [entry for entry in found if entry not in chosen]
    if as_json:
        print_json([asdict(entry) for entry in found])
        return
    rows = [("kind", "name", "size", "last used")]
    for entry in found:
        used = f"{datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}"
        rows.append((entry.kind, entry.path.name, humane(entry.bytes, "B"), used))
    print_columns(rows)
    typer.echo(f"{humane(sum(entry.bytes for entry in found), 'B')} in {cache_dir()}", err=True)
