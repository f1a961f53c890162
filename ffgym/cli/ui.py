"""``ffgym ui``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import RootOption, key_option
from ffgym.config.tables import TrackingTable


@app.command()
def ui(
    root: RootOption = TrackingTable().root,
    experiment: Annotated[str, key_option("--experiment", "tracking.experiment")] = TrackingTable().experiment,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 5000,
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
) -> None:
    """Open the MLflow page of the runs that were tracked, best result first."""
    from ffgym.tracking.ui import open_ui

    open_ui(Path(root).expanduser(), experiment, port, notify=typer.echo, browser=browser)
