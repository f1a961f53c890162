"""``measure_serving(folder, engine)``: how fast an engine serves a pruned model and the dense one it was made from.

which models -> a server of each -> bursts of requests, the servers in turn -> medians and their spread

A burst is a number of requests at the same moment; see `ffgym.measure.bursts`.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from ffgym.costs.latency_cache import BUSY
from ffgym.costs.timing import Spread, ends
from ffgym.errors import ConfigError, ModelError
from ffgym.export.refresh import is_current
from ffgym.measure.bursts import Bursts, prompt_maker, serve_in_turn
from ffgym.measure.engines import DENSE, DENSE_AS_PRUNED, ENGINES, PRUNED, ServedModel, Setting, check_dtype
from ffgym.measure.pairs import HINT
from ffgym.measure.speed import Workload
from ffgym.measure.table import rate
from ffgym.models.checkpoint import model_folder, weights_on_disk
from ffgym.models.loading import checkpoint_folder, load_config, load_tokenizer
from ffgym.models.modeling_ffgym import PREFIX
from ffgym.models.origin import DenseModel, dense_model
from ffgym.report.layout import Column, Table, counted, text_columns
from ffgym.report.progress import Reporter

SPARE_TOKENS = 8  # an engine may count more tokens in a prompt than ffgym does
AS_PRUNED = "through the backend that serves the pruned model, not the engine's own class"
ALIKE = ("vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Served:
    """One model under one workload."""

    model: str
    workload: Workload
    tokens_per_second: Spread  # of the answers, over all requests
    first_seconds: Spread  # from a request to the first token of its answer; the median of a burst's requests
    following_seconds: Spread  # of every further token, likewise
    ratio: Spread  # of its tokens per second to the dense model's in the same repetition
    backend_ratio: Spread | None  # to the dense model's through the same backend, where that differs

    @property
    def noise(self) -> float:
        """Distance of the ends of a ratio's spread as a share of its median, the larger one where there are two."""
        ratios = [self.ratio] if self.backend_ratio is None else [self.ratio, self.backend_ratio]
        return max((ratio.high - ratio.low) / ratio.median for ratio in ratios)


@dataclass(frozen=True)
class ServingMeasurement:
    """Everything that was measured, and how."""

    engine: str
    dense: str
    pruned: str
    served: tuple[Served, ...]  # every model under every workload
    answer_tokens: tuple[int, int]  # of the shortest and of the longest answer
    device: str
    processors: int  # of the CPU
    threads: int | None  # that were asked for
    dtype: str
    repetitions: int  # of which the figures are medians
    together: bool  # the servers ran at the same time and took turns; else each was started for its turn
    arguments: tuple[str, ...]  # of the engine, beyond ffgym's own

    def tables(self) -> tuple[Table[Sequence[str]], Table[Sequence[str]]]:
        """Speeds, then ratios, how all was measured under them."""
        speeds = [
            (*_names(one), rate(one.tokens_per_second), rate(one.first_seconds, 1e3), rate(one.following_seconds, 1e3))
            for one in self.served
        ]
        ratios = [
            (*_names(one), rate(one.ratio), "" if one.backend_ratio is None else rate(one.backend_ratio))
            for one in self.served
            if one.model != DENSE
        ]
        as_pruned = ["tokens/s, over dense as pruned"] * any(each.backend_ratio for each in self.served)
        return (
            Table(_columns("tokens/s", "first token, ms", "per token, ms"), speeds, space=1),
            Table(_columns("tokens/s, over dense", *as_pruned), ratios, self._notes(), space=1),
        )

    def _notes(self) -> list[str]:
        fewest, most = self.answer_tokens
        tokens = str(most) if fewest == most else f"{fewest} to {most}"
        threads = "" if self.threads is None else f", {counted(self.threads, 'thread')}"
        turns = "servers that take turns" if self.together else "servers that are started anew for each turn"
        if self.repetitions == 1:
            figures = f"One repetition with {turns}, so noise cannot be seen."
        else:
            figures = f"Medians of {self.repetitions} repetitions with {turns}, {ends(self.repetitions)} in brackets."
        lines = [
            f"Dense: {self.dense}. Pruned: {self.pruned}. {self.engine}, {self.dtype}, {self.device}, "
            f"{counted(self.processors, 'processor')}{threads}.",
            f"{figures} {tokens} tokens an answer, as the server counts them. Ratios are those within a repetition."
            + (f" Dense, as pruned: {AS_PRUNED}." if any(each.backend_ratio for each in self.served) else ""),
        ]
        if self.dense == self.pruned:
            lines.append("The same model twice: ratios differ from 1 by noise only.")
        noisiest = max(self.served, key=lambda each: each.noise)
        if noisiest.noise > BUSY:
            workload, model = _names(noisiest)
            lines.append(
                f"The ratio of {model!r} at {workload} differs by {noisiest.noise:.0%} ({ends(self.repetitions)}): the"
                " machine was busy. Measure again when it is quiet."
            )
        if self.arguments:
            lines.append(f"More arguments of the engine: {' '.join(self.arguments)}.")
        return lines


def measure_serving(
    folder: Path,
    engine: str,
    dense: str | None = None,
    requests: Sequence[int] = (1, 4),
    *,
    prompt_lengths: Sequence[int] = (128, 512),
    output_tokens: int = 64,
    repetitions: int = 7,
    dtype: str = "auto",
    threads: int | None = None,
    arguments: Sequence[str] = (),
) -> ServingMeasurement:
    """Measure how fast an engine serves a saved model and the dense one: what ``ffgym measure --engine`` shows.

    Raises:
        ModelError: a folder that is no model, two models that do not belong together, an engine that is not installed
            or cannot represent a model, a server that dies or does not answer.
        ConfigError: no record of the dense model, or prompts that are too long for the models.
    """
    reporter = Reporter()
    pruned = model_folder(folder)
    source = dense_model(pruned, dense)
    dense_folder = _dense_folder(source)
    prompts = prompt_maker(load_tokenizer(pruned))
    context, has_class_file = _checked(dense_folder, pruned, max(prompt_lengths), output_tokens)
    dtype = weights_on_disk(pruned)[1] if dtype == "auto" else dtype
    check_dtype(dtype)
    workloads = [Workload(count, length) for count, length in product(requests, prompt_lengths)]
    with tempfile.TemporaryDirectory(prefix="ffgym-serving-") as scratch:
        setting = Setting(
            dtype=dtype,
            context=context,
            requests=max(requests),
            output_tokens=output_tokens,
            repetitions=repetitions,
            threads=threads,
            arguments=arguments,
            scratch=Path(scratch),
        )
        models = [ServedModel(DENSE, dense_folder), ServedModel(PRUNED, pruned, has_class_file)]
        with reporter.stage(f"prepare {engine}", 1):
            fleet = ENGINES[engine](setting, models)
        together = fleet.fits_memory()
        reporter.print(f"dense: {source.name}, named by {source.said_by}; pruned: {pruned}")
        reporter.print(f"{fleet.version}, {dtype}, {counted(len(fleet.servers), 'server')}")
        found = serve_in_turn(fleet.servers, workloads, prompts, setting, reporter, together=together)
    tokens = [answer.tokens for bursts in found.values() for burst in bursts for answer in burst.answers]
    return ServingMeasurement(
        engine=fleet.version,
        dense=str(pruned) if dense_folder.samefile(pruned) else source.name,
        pruned=str(pruned),
        served=tuple(_summarised(found)),
        answer_tokens=(min(tokens), max(tokens)),
        device=fleet.device,
        processors=os.cpu_count() or 1,
        threads=threads,
        dtype=dtype,
        repetitions=repetitions,
        together=together,
        arguments=tuple(arguments),
    )


def _names(served: Served) -> tuple[str, str]:
    return f"{served.workload.batch} x {served.workload.length:,}", served.model


def _columns(*figures: str) -> list[Column[Sequence[str]]]:
    workload, model, *others = text_columns("requests, x prompt", "model", *figures, no_wrap=True)
    return [replace(workload, once=True), replace(model, left=True), *others]


def _dense_folder(source: DenseModel) -> Path:
    try:
        with source.named():
            return checkpoint_folder(source.name, revision=source.revision)
    except OSError as error:  # servers run offline
        raise ModelError(
            f"the dense model {source.name!r}, which {source.said_by} names, is not in the hub's cache",
            hint=f"Download it: hf download {source.name}. Or name a folder with --dense.",
        ) from error


def _checked(dense: Path, pruned: Path, longest: int, output_tokens: int) -> tuple[int, bool]:
    """Tokens of the longest prompt with its answer, and whether the pruned model has a class file."""
    before, after = load_config(dense), load_config(pruned)
    facts, others = (
        {"family": str(config.model_type).removeprefix(PREFIX), **{name: getattr(config, name) for name in ALIKE}}
        for config in (before, after)
    )
    for name, fact in facts.items():
        if fact != others[name]:
            raise ModelError(f"{name} is {fact} in the dense model and {others[name]} in the pruned one", hint=HINT)
    has_class_file = str(after.model_type).startswith(PREFIX)
    if has_class_file and not is_current(pruned):
        raise ModelError(
            f"the class file in {pruned}, which a server runs, is missing, or not the one that this ffgym writes",
            hint=f"Read it; then bring it up to date: ffgym export {shlex.quote(str(pruned))} --refresh",
        )
    room = min(before.max_position_embeddings, after.max_position_embeddings) - output_tokens - SPARE_TOKENS
    if longest > room:
        raise ConfigError(
            f"--prompt-lengths {longest} and --output-tokens {output_tokens} are more than the "
            f"{room + output_tokens} tokens that the models take",
            hint=f"Use prompts of at most {room} tokens." if room > 0 else "Use fewer --output-tokens.",
        )
    return longest + output_tokens + SPARE_TOKENS, has_class_file


def _summarised(found: Bursts) -> Iterator[Served]:
    rates = {key: np.array([burst.rate for burst in bursts]) for key, bursts in found.items()}
    for (model, workload), bursts in sorted(found.items(), key=lambda item: (item[0][1].batch, item[0][1].length)):
        own, same = rates[DENSE, workload], rates.get((DENSE_AS_PRUNED, workload))
        yield Served(
            model=model,
            workload=workload,
            tokens_per_second=Spread.of(rates[model, workload]),
            first_seconds=Spread.of([burst.first for burst in bursts]),
            following_seconds=Spread.of([burst.following for burst in bursts]),
            ratio=Spread.of(rates[model, workload] / own),
            backend_ratio=None if same is None or model != PRUNED else Spread.of(rates[model, workload] / same),
        )
