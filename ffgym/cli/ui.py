"""``ffgym ui``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import RootOption
from ffgym.config.tables import TrackingTable


@app.command()
def ui(
    root: RootOption = TrackingTable().root,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow user interface on the runs that were tracked."""
    from ffgym.tracking.ui import open_ui

    open_ui(Path(root).expanduser(), port)
