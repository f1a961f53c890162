"""``ffgym export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption, OverwriteFileOption
from ffgym.cli.printing import print_json


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder of the model, e.g. runs/mine/model", show_default=False)
    ],
    file: Annotated[Path, typer.Option("--gguf", metavar="FILE", help="GGUF file to write", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="f32, f16 or bf16", show_default="what the weights are in")
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a saved model as a GGUF file, which llama.cpp runs.

    Example: ffgym export runs/mine/model --gguf mine.gguf --dtype f16
    """
    from rich.console import Console

    from ffgym.export.gguf.gguf import export_gguf, run_line
    from ffgym.report.progress import Reporter

    with Reporter(Console(stderr=True)).stage(f"write {file.name}", 1) as stage:
        written = export_gguf(folder, file, dtype=dtype, overwrite=overwrite, progress=stage)
    if as_json:
        print_json({**asdict(written), "path": str(written.path), "run": run_line(written.path)})
        return
    typer.echo(
        f"{written.path}: {written.bytes / 1e6:.1f} MB, {written.parameters / 1e6:.1f} M parameters in {written.dtype},"
        f" architecture {written.architecture}"
    )
    for note in written.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"run it (needs pip install 'ffgym[llama-cpp]', or llama.cpp itself):\n  {run_line(written.path)}")
