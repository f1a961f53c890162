"""``ffgym sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import RootOption
from ffgym.config.tables import TrackingTable
from ffgym.errors import TrackingError


@app.command()
def sync(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="where runs keep their files", show_default="runs and the store's folder"),
    ] = None,
    root: RootOption = TrackingTable().root,
) -> None:
    """Send what runs kept on disk because their MLflow server could not be reached."""
    from ffgym.tracking.outbox import sync as send_all

    store, named = Path(root).expanduser(), [folder.expanduser() for folder in folders or []]
    if missing := next((folder for folder in named if not folder.is_dir()), None):
        raise TrackingError(f"there is no folder {missing}", hint="Name the folder of a run, or of several.")
    if not send_all(store, named or [Path("runs"), store], typer.echo):
        typer.echo("nothing is waiting to be sent", err=True)
