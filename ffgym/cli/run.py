"""``ffgym run``, ``plan``, ``prepare`` and ``config``: the commands that take a run configuration."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ffgym.cli.app import app
from ffgym.cli.options import KEYS, JsonOption, configured, parameter_of
from ffgym.cli.printing import print_json
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config, to_toml
from ffgym.errors import ConfigError
from ffgym.prepare.configured import meanings

NO_COST = {"--seed", "--output", "--overwrite", "--save-at"}  # of a plan
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="folder of an interrupted run to continue, with its configuration; only options of \\[output], "
        "\\[tracking] and \\[workers] may differ from it",
        show_default="none",
    ),
]


@app.command()
@configured(KEYS)
def run(config: RunConfig, resume: ResumeOption = None, as_json: JsonOption = False) -> None:
    """Search how much of each layer to remove, prune, refit, report, and save the smaller model.

    Without options it makes the demo model 20 % smaller. Examples:

    \b
    ffgym run --sparsity 0.3 --agent cma-es
    ffgym run --model ./my-model --resource latency
    ffgym run --sparsity 0.1:0.5 --save-all    one policy for the whole range
    """
    from rich.console import Console

    from ffgym.pipeline import start

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is progress; stdout is for the result
        result = start.run(config, resume=resume)
    if as_json:
        print_json(result.to_json())
    else:
        result.print(Console())


@app.command()
@configured([flag for flag in KEYS if flag not in NO_COST])
def plan(
    config: RunConfig,
    context: typer.Context,
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
        if context.params[parameter_of("--model")] is not None:
            raise typer.BadParameter("the model is named by --model already", param_hint="MODEL")
        config = load_config(config, model={"name": model})
    from ffgym.pipeline.start import check_inputs, settle

    config = settle(config)
    from rich.console import Console

    from ffgym.pipeline.plan import plan_run
    from ffgym.plan.table import show, to_json
    from ffgym.plugins import manager

    check_inputs(config)
    # search.init_from is not read: the run that writes that policy may come later
    found = plan_run(config, manager.create("agent", config.agent.name, config.agent.options))
    if as_json:
        print_json(to_json(found))
    else:
        show(found, Console())


@app.command("prepare")
@configured(["--model", "--criterion", "--calibration", "--prior"])
def prepare_model(config: RunConfig) -> None:
    """Prepare a model ahead of its runs: statistics, order and refits, kept in the cache.

    A run with the same model, criterion, calibration, text and number of threads then opens what was prepared.
    For `bench --workers 2` on two cores, where each worker has one thread, set OMP_NUM_THREADS=1.
    """
    from ffgym.pipeline.start import check_inputs, settle

    config = settle(config)
    from ffgym.pipeline.compare import asked_rules
    from ffgym.pipeline.task import open_task
    from ffgym.plugins import manager
    from ffgym.plugins.bases import Criterion
    from ffgym.prepare.store import is_stored
    from ffgym.report.progress import Reporter

    check_inputs(config)
    criterion: Criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    if not is_stored(criterion, config.prune.calibration):
        raise ConfigError(
            "what is prepared cannot be kept in the cache, so no run would find it",
            hint="Give FFGYM_CACHE_SIZE a size, use a criterion that is a file of a package, or use --calibration "
            "ridge.",
        )
    task = open_task(config, asked_rules(config), Reporter())
    typer.echo(f"the prepared model is in {task.prepared.store}")


@app.command("config")
@configured(KEYS)
def print_config(config: RunConfig) -> None:
    """Print the configuration that `run` would start with, as a TOML file that `run --config` reads."""
    from ffgym.pipeline.start import settle

    config = settle(config)
    typer.echo(to_toml(config, meanings(config)), nl=False)
