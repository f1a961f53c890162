"""``ffgym recover``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption, SetOption, key_option
from ffgym.cli.printing import print_json
from ffgym.config.toml import load_config


@app.command()
def recover(
    folder: Annotated[Path, typer.Argument(help="a saved model, or the folder of its run", show_default=False)],
    method: Annotated[str | None, key_option("--method", "recover.method")] = None,
    corpus: Annotated[str | None, key_option("--corpus", "recover.corpus")] = None,
    tokens: Annotated[str | None, key_option("--tokens", "recover.tokens")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="lora: recover.rank, rank of the adapters")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="the dense model, as for `run`", show_default="as in the run's config.toml"),
    ] = None,
    seed: Annotated[int | None, key_option("--seed", "seed")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file of the run that pruned the model",
            show_default="config.toml in the folder or next to it",
        ),
    ] = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="folder of the new model", show_default="next to the old one: NAME-recovered"),
    ] = None,
    overwrite: Annotated[bool, key_option("--overwrite", "output.overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a pruned model and save it again; after Ctrl-C the same command continues.

    Example: ffgym recover runs/mine --method lora --corpus my.txt --tokens 1M --output recovered
    """
    from rich.console import Console

    from ffgym.recover import recover
    from ffgym.recover.folders import find_run_config

    known = file or find_run_config(folder)
    config = load_config(
        known,
        overrides or [],
        seed=seed,
        model={"name": model},
        recover={"method": method, "corpus": corpus, "tokens": tokens, "rank": rank},
    )
    if known is None:
        typer.echo("found no config.toml of the run next to the model: the splits are those of your options", err=True)
    with contextlib.redirect_stdout(sys.stderr):
        result = recover.recover(config, folder, output=output, overwrite=overwrite)
    if as_json:
        print_json(result.to_json())
    else:
        result.print(Console())
