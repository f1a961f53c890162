"""``ffgym export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption, OverwriteFileOption
from ffgym.cli.printing import print_json
from ffgym.config.toml import parsed_overrides
from ffgym.report.layout import humane


@app.command()
def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="saved model, folder of a run, demo, or a hub id that was downloaded",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option("--format", help="what to write, one of `ffgym ls exports`")] = "gguf",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="file or folder to write", show_default=False)
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", metavar="FILE", help="short for --format gguf --output FILE", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="f32, f16 or bf16, as --set dtype=...", show_default="the weights'")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an option of the format; repeatable")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--refresh", help="write nothing new: bring the class file beside the weights up to date")
    ] = False,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a saved model for another program, e.g. as a GGUF file, which llama.cpp runs.

    ffgym export runs/mine --gguf mine.gguf --dtype f16

    ffgym export runs/mine --format nemotron-nas --output mine-nas
    """
    from ffgym.export.format import export as write
    from ffgym.report.progress import Reporter

    if renew:
        from ffgym.export.refresh import refresh

        if output or gguf or dtype or overrides or overwrite or name != "gguf":
            raise typer.BadParameter("--refresh changes DIR itself, takes no options and writes nowhere else")
        files = refresh(folder)
        if as_json:
            print_json({"files": files})
        else:
            typer.echo("\n".join(f"wrote {path}" for path in files) or "its class file and config are up to date")
        return
    target = output or gguf
    if target is None or (output and gguf) or (gguf and name != "gguf"):
        raise typer.BadParameter("name what to write, once", param_hint="--output PATH or --gguf FILE")
    options = parsed_overrides(overrides or [])
    if dtype is not None and options.setdefault("dtype", dtype) != dtype:
        raise typer.BadParameter(f"{dtype!r}, and --set dtype says {options['dtype']!r}", param_hint="--dtype")
    with Reporter().stage(f"write {target.name}", 1) as stage:
        written = write(folder, target, name=name, options=options, overwrite=overwrite, progress=stage)
    if as_json:
        print_json(asdict(written))
        return
    typer.echo(
        f"{written.path}: {humane(written.bytes, 'B')}, {humane(written.parameters)} parameters in {written.dtype},"
        f" architecture {written.architecture}"
    )
    for note in written.notes:
        typer.echo(f"note: {note}")
    if written.run:
        needs = f" (needs {written.needs})" if written.needs else ""
        typer.echo(f"run it{needs}:\n  {written.run}")
