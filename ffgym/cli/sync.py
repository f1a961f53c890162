"""``ffgym sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import RootOption
from ffgym.config.tables import TrackingTable


@app.command()
def sync(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="where runs keep their files", show_default="runs and the store's folder"),
    ] = None,
    root: RootOption = TrackingTable().root,
) -> None:
    """Send what runs kept on disk while their MLflow server was away."""
    from ffgym.tracking.sync import sync as send_all

    store = Path(root).expanduser()
    if not send_all(store, folders or [Path("runs"), store], typer.echo):
        typer.echo("nothing is waiting to be sent", err=True)
