"""Latency tables, timed once on a machine and kept in the user's cache folder, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ffgym.costs.latency_table import FORMAT, LatencyTable, Serving, layer_shapes, model_shape, read_table, to_json
from ffgym.costs.sublayer_times import REPETITIONS, processors, threads_of, time_model
from ffgym.costs.timing import ends
from ffgym.data.cache import cache_dir
from ffgym.errors import BudgetError, ConfigError, OutputError
from ffgym.files import json_digest, write_text
from ffgym.types import JSONDict, Notify, OnStep, do_nothing

# If the ends of a spread are further apart than this share of the median, the machine was doing something else.
BUSY = 0.25


def cached_table(
    model: Any,
    *,
    context: int,
    rebuild: bool = False,
    repetitions: int = REPETITIONS,
    on_progress: OnStep = do_nothing,
    notify: Notify = do_nothing,
) -> LatencyTable:
    """The table of a model on this machine: from the cache, or timed now and kept there.

    Args:
        model: dense causal LM in eval mode.
        context: tokens in the window that is timed.
        rebuild: time again even if the cache has a table.
        repetitions, on_progress: see `time_model`.
        notify: called with lines for the user, e.g. about a cache that is damaged or cannot be written.

    Raises:
        BudgetError: the model takes fewer than ``context`` tokens.
        ModelError: an unsupported architecture.
    """
    check_context(context, int(model.config.max_position_embeddings))
    return timed_once(
        place_of(model, context=context),
        lambda: time_model(model, context=context, repetitions=repetitions, on_progress=on_progress),
        repetitions=repetitions,
        rebuild=rebuild,
        notify=notify,
    )


def check_context(context: int, limit: int) -> None:
    """Raise ``BudgetError`` where a window of ``context`` tokens is longer than what a model takes, ``limit``."""
    if context > limit:
        raise BudgetError(
            f"latency is timed on windows of prune.context = {context} tokens, and this model takes at most {limit}",
            hint=f"Take {limit}: --context {limit} of `ffgym latency`, or --set prune.context={limit} of a run.",
        )


def timed_once(
    path: Path, time: Callable[[], LatencyTable], *, repetitions: int, rebuild: bool, notify: Notify
) -> LatencyTable:
    """The table that the cache keeps at ``path``, or else what ``time`` returns, which is then kept there."""
    if path.exists() and not rebuild:
        try:
            table = read_table(path)
        except ConfigError as error:
            notify(f"{error.message}; timing again")
        else:
            if table.repetitions != repetitions:
                notify(f"from the cache, where each was timed {table.repetitions} times; --rebuild times again")
            notify_if_busy(table, notify)
            return table
    table = time()
    notify_if_busy(table, notify)
    try:
        write_text(path, to_json(table))
    except OutputError as error:
        notify(f"the latency table could not be saved: {error.message}")
    return table


def notify_if_busy(table: LatencyTable, notify: Notify) -> None:
    """Tell the user if a table's times were disturbed, however old it is."""
    if table.noise > BUSY:
        notify(
            f"the times differ by {table.noise:.0%} ({ends(table.repetitions)}): the machine was busy. Time again when"
            " it is quiet: ffgym latency --rebuild, with the other options that the table was made with"
        )


def place_of(
    model: Any, *, context: int, serving: Serving | None = None, device: str | None = None, threads: int | None = None
) -> Path:
    """Where the cache keeps, or would keep, the table of this model on this machine.

    Args:
        serving: the engine that it is timed in; ``None`` for forward passes.
        device: that the engine computes on.
        threads: that the engine was given.
    """
    head = model.get_output_embeddings().weight
    facts: JSONDict = {  # what times depend on
        "format": FORMAT,
        "model": model_shape(model).model_dump(),
        "shapes": sorted({shape.model_dump_json() for shape in layer_shapes(model)}),
        "device": device or processors(model),
        "threads": threads_of(head.device) if serving is None else threads,
        "torch": torch.__version__,
        "dtype": str(head.dtype).removeprefix("torch."),
        "context": context,
        **({} if serving is None else {"serving": serving.model_dump(mode="json")}),
    }
    return cache_dir() / "latency" / f"{model.config.model_type}-{json_digest(facts)[:16]}.json"
