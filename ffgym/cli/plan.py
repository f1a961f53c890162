"""``ffgym plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import KEYS, JsonOption, configured
from ffgym.cli.printing import print_json
from ffgym.config.tables import RunConfig
from ffgym.plugins.architectures import check_folder_architecture

NO_COST = {"--seed", "--output", "--overwrite", "--save-at"}


@app.command()
@configured([flag for flag in KEYS if flag not in NO_COST])
def plan(
    config: RunConfig,
    model: Annotated[
        str | None,
        typer.Argument(
            help="in place of --model: demo, a hub id, a .gguf file, or a folder, which needs only its config.json",
            show_default="demo",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run needs, before anything is loaded or downloaded: memory, disk, operations, time.

    It takes the options of `run` that change these. Examples:

    \b
    ffgym plan ./my-model --sparsity 0.3
    ffgym plan meta-llama/Llama-3.1-70B --set model.placement=stream
    """
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": model})})
    check_folder_architecture(config.model.name)
    from rich.console import Console

    from ffgym.pipeline.plan import plan_run
    from ffgym.pipeline.settle import settle
    from ffgym.plan.table import show, to_json
    from ffgym.plugins import manager

    config = settle(config)
    # search.init_from is not read: the run that writes that policy may come later
    found = plan_run(config, manager.create("agent", config.agent.name, config.agent.options))
    if as_json:
        print_json(to_json(found))
    else:
        show(found, Console())
