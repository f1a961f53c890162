"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ffgym.config import RunConfig, TrackingTable, load_config, to_toml
from ffgym.errors import FFGymError
from ffgym.plugins import manager
from ffgym.version import __version__


class Guarded(TyperGroup):
    """Turns errors that ffgym raises on purpose into a message and exit 1, and Ctrl-C into exit 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FFGymError as error:
            typer.secho(f"error: {error.message}", fg="red", err=True)
            if error.hint is not None:
                typer.echo(f"hint: {error.hint}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find out how much of each layer of a language model can go, and save the smaller model.",
)


def _option(flag: str, key: str) -> Any:
    """A command-line option for one key of the run configuration, whose description and default it shows."""
    table, _, field_name = key.rpartition(".")
    owner = getattr(RunConfig(), table) if table else RunConfig()
    field = type(owner).model_fields[field_name]
    default = getattr(owner, field_name)
    return typer.Option(flag, help=field.description, show_default="none" if default is None else str(default))


AgentOption = Annotated[str | None, _option("--agent", "agent.name")]
CriterionOption = Annotated[str | None, _option("--criterion", "criterion.name")]
RewardOption = Annotated[str | None, _option("--reward", "reward.name")]
PriorOption = Annotated[str | None, _option("--prior", "prior.name")]
ModelOption = Annotated[str | None, _option("--model", "model.name")]
SparsityOption = Annotated[float | None, _option("--sparsity", "prune.sparsity")]
CalibrationOption = Annotated[str | None, _option("--calibration", "prune.calibration")]
ResourceOption = Annotated[str | None, _option("--resource", "prune.resource")]
RecoverOption = Annotated[str | None, _option("--recover", "recover.method")]
InitFromOption = Annotated[str | None, _option("--init-from", "search.init_from")]
EpisodesOption = Annotated[int | None, _option("--episodes", "search.episodes")]
SeedOption = Annotated[int | None, _option("--seed", "seed")]
OutputOption = Annotated[str | None, _option("--output", "output.dir")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace what is in a folder that is not empty")]
FileOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file to start from; the options here win over it")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="any other setting, e.g. prune.min_units=2; repeatable"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout and nothing else")]


def _config(ctx: typer.Context) -> RunConfig:
    """The configuration that the options of the running command describe."""
    given = ctx.params
    config = load_config(
        given.get("file"),
        given.get("overrides") or [],
        seed=given.get("seed"),
        model={"name": given.get("model")},
        prune={key: given.get(key) for key in ("sparsity", "calibration", "resource")},
        criterion={"name": given.get("criterion")},
        reward={"name": given.get("reward")},
        agent={"name": given.get("agent")},
        prior={"name": given.get("prior")},
        search={"episodes": given.get("episodes"), "init_from": given.get("init_from")},
        recover={"method": given.get("recover")},
        output={"dir": given.get("output"), "overwrite": given.get("overwrite") or None},
    )
    return manager.resolve_agent(config)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Hold the options that stand before any command."""
    if version:
        typer.echo(f"ffgym {__version__}")
        raise typer.Exit


@app.command()
def run(
    ctx: typer.Context,
    agent: AgentOption = None,
    criterion: CriterionOption = None,
    reward: RewardOption = None,
    prior: PriorOption = None,
    model: ModelOption = None,
    sparsity: SparsityOption = None,
    calibration: CalibrationOption = None,
    resource: ResourceOption = None,
    init_from: InitFromOption = None,
    recover: RecoverOption = None,
    episodes: EpisodesOption = None,
    seed: SeedOption = None,
    file: FileOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search how much of each layer goes, prune, refit, report, and save the smaller model.

    Without options it makes the demo model 20 % smaller.
    """
    config = _config(ctx)
    from rich.console import Console

    from ffgym import runner

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is progress; stdout is for the result
        result = runner.run(config, progress=Console(stderr=True))
    if as_json:
        _print_json(result.to_json())
    else:
        result.print(Console())


@app.command()
def recover(
    folder: Annotated[Path, typer.Argument(help="a saved model, or the folder of its run", show_default=False)],
    method: Annotated[str | None, _option("--method", "recover.method")] = None,
    corpus: Annotated[str | None, _option("--corpus", "recover.corpus")] = None,
    tokens: Annotated[str | None, _option("--tokens", "recover.tokens")] = None,
    rank: Annotated[int | None, _option("--rank", "recover.rank")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="the dense model, as for `run`", show_default="what the run's config.toml says"),
    ] = None,
    seed: SeedOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file of the run that pruned the model",
            show_default="config.toml in the folder or beside it",
        ),
    ] = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="folder of the new model", show_default="beside the old one: NAME-recovered"),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a pruned model and save it again; after Ctrl-C the same command goes on.

    Example: ffgym recover runs/mine --method lora --corpus my.txt --tokens 1M --output recovered
    """
    from rich.console import Console

    from ffgym import recovery

    known = file or recovery.find_run_config(folder)
    config = load_config(
        known,
        overrides or [],
        seed=seed,
        model={"name": model},
        recover={"method": method, "corpus": corpus, "tokens": tokens, "rank": rank},
    )
    if known is None:
        typer.echo("no config.toml of the run beside the model: the splits are those of the options here", err=True)
    dense = config.model.name if known is not None or model is not None else None
    with contextlib.redirect_stdout(sys.stderr):
        result = recovery.recover(
            config, folder, output=output, overwrite=overwrite, dense=dense, progress=Console(stderr=True)
        )
    if as_json:
        _print_json(result.to_json())
    else:
        result.print(Console())


@app.command()
def bench(
    files: Annotated[list[Path], typer.Option("--config", help="bench file (TOML); repeatable", show_default=False)],
    more: Annotated[list[Path] | None, typer.Argument(help="further bench files", show_default=False)] = None,
    only_report: Annotated[bool, typer.Option("--report", help="compute nothing, show what is there")] = False,
) -> None:
    """Run many searches on equal terms and compare them; what was computed before is kept."""
    from rich.console import Console

    from ffgym.bench import bench as run_bench
    from ffgym.report.bench import markdown

    with contextlib.redirect_stdout(sys.stderr):
        tables = run_bench([*files, *(more or [])], progress=Console(stderr=True), only_report=only_report)
    for table in tables:
        typer.echo(markdown(table))


@app.command("config")
def print_config(
    ctx: typer.Context,
    agent: AgentOption = None,
    criterion: CriterionOption = None,
    reward: RewardOption = None,
    prior: PriorOption = None,
    model: ModelOption = None,
    sparsity: SparsityOption = None,
    calibration: CalibrationOption = None,
    resource: ResourceOption = None,
    init_from: InitFromOption = None,
    recover: RecoverOption = None,
    episodes: EpisodesOption = None,
    seed: SeedOption = None,
    file: FileOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Print what `run` would do with the same options, as a TOML file that `run --config` reads."""
    typer.echo(to_toml(_config(ctx)), nl=False)


class Kinds(StrEnum):
    """What `ls` lists."""

    agents = "agents"
    criteria = "criteria"
    heuristics = "heuristics"
    rewards = "rewards"


_KINDS: dict[Kinds, manager.PluginKind] = {
    Kinds.agents: "agent",
    Kinds.criteria: "criterion",
    Kinds.heuristics: "heuristic",
    Kinds.rewards: "reward",
}


@app.command("ls")
def list_names(
    kind: Annotated[Kinds, typer.Argument(help="what to list", show_default=False)], as_json: JsonOption = False
) -> None:
    """List the names that `run` takes for --agent, --criterion, --prior (heuristics) or --reward."""
    found = manager.names(_KINDS[kind])
    if as_json:
        _print_json([{"name": name, "description": line} for name, line in found.items()])
    else:
        _print_columns(found.items())


@app.command()
def plugins(as_json: JsonOption = False) -> None:
    """List the installed plugins: what each provides, and what stopped it if it could not be loaded."""
    records = manager.records()
    if as_json:
        _print_json([asdict(record) for record in records])
        return
    rows = []
    for record in records:
        provides = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in record.provides.items())
        remark = provides if record.failure is None else f"FAILED {record.failure}"
        rows.append((record.name, f"{record.package} {record.version}".strip(), remark))
    _print_columns(rows)


@app.command("check-env")
def check_env(
    ctx: typer.Context,
    model: ModelOption = None,
    seed: SeedOption = None,
    file: FileOption = None,
    overrides: SetOption = None,
) -> None:
    """Run Gymnasium's and Stable-Baselines3's environment checkers on the pruning environment."""
    config = _config(ctx)
    from ffgym.envs.check import check_environment

    complaints = check_environment(config)
    for complaint in complaints:
        typer.secho(complaint, fg="red", err=True)
    if complaints:
        raise typer.Exit(1)
    typer.echo("ok: both checkers pass without a warning")


@app.command()
def ui(
    root: Annotated[str, typer.Option(help="folder of the MLflow store")] = TrackingTable().root,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow user interface on the runs that were tracked."""
    from ffgym.tracking import open_ui

    open_ui(Path(root), port)


def _print_columns(rows: Iterable[Sequence[str]]) -> None:
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(_strict(data), indent=2, ensure_ascii=False, allow_nan=False))


def _strict(data: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(data, Mapping):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def main() -> None:
    """Be the console script ``ffgym``."""
    app(prog_name="ffgym")
