"""``served_latency_table(...)``: how long the sublayers of a dense model take in the engine that will serve it.

An engine runs whole models. So for each shape of sublayer, and a few sizes of it, a model is saved in which all
sublayers of that shape have that size and everything else is dense. Servers of all of them, and of the dense model, get
the same bursts of requests in turn. What a sublayer takes is its share of what the whole model takes longer than one
without such units.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ffgym.costs.latency_cache import place_of, timed_once
from ffgym.costs.latency_fit import seconds_without, timed_sizes
from ffgym.costs.latency_table import Curve, LatencyTable, LayerShape, Serving, layer_shapes, model_shape
from ffgym.costs.timing import Spread
from ffgym.errors import ConfigError
from ffgym.export.checkpoint import save_pruned
from ffgym.files import check_room
from ffgym.measure.bursts import prompt_maker, serve_in_turn
from ffgym.measure.engines import DENSE, ENGINES, ServedModel, Setting, check_dtype
from ffgym.measure.server import Server
from ffgym.measure.serving import SPARE_TOKENS
from ffgym.measure.speed import Workload
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import LoadedModel, context_limit, load
from ffgym.models.placement import choose_dtype
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter

PARTS = 4
LEAST_SECONDS = 1e-12  # a table's times are above 0


@dataclass(frozen=True)
class _Probe:
    """A size of one shape of sublayer: a model in which all sublayers of the shape have that size."""

    shape: LayerShape
    size: int

    @property
    def role(self) -> str:
        return " ".join(filter(None, (self.shape.kind, self.shape.attends, f"{self.size:,}")))


def served_latency_table(
    model: str,
    engine: str,
    context: int,
    *,
    requests: int = 1,
    output_tokens: int = 64,
    repetitions: int = 5,
    dtype: str = "auto",
    threads: int | None = None,
    arguments: Sequence[str] = (),
    rebuild: bool = False,
) -> tuple[LatencyTable, Path]:
    """The latency table of a model in an engine on this machine, and where the cache keeps it: ``ffgym latency``.

    Raises:
        ModelError: a model that cannot be loaded or is pruned already, an engine that is not installed or cannot
            represent the model, a server that dies or does not answer.
        BudgetError: a model with mixtures of experts.
        ConfigError: it takes fewer tokens than ``context``, answers leave nothing of them to a prompt, or its dtype is
            none that engines serve.
        OutputError: the disk has no room for the models that are served.
    """
    if output_tokens >= context:
        raise ConfigError(
            f"--output-tokens is {output_tokens}, and a request has --context = {context} tokens with its answer",
            hint="Use fewer than the context.",
        )
    reporter = Reporter()
    with tempfile.TemporaryDirectory(prefix="ffgym-serving-") as folder:
        setting = Setting(
            dtype=dtype,
            context=context + SPARE_TOKENS,
            requests=requests,
            output_tokens=output_tokens,
            repetitions=repetitions,
            threads=threads,
            arguments=arguments,
            scratch=Path(folder),
        )
        fleet = ENGINES[engine](setting, ())  # before anything is loaded: is it installed?
        serving = Serving(
            engine=fleet.version, requests=requests, output_tokens=output_tokens, arguments=tuple(arguments)
        )
        limit = context_limit(model)
        room = limit - SPARE_TOKENS
        if context > room:
            raise ConfigError(
                f"--context {context}: the model takes at most {limit} tokens, and an engine may"
                f" count {SPARE_TOKENS} more in a prompt",
                hint=f"Use at most {room}.",
            )
        if dtype == "auto" and fleet.gpu is not None and torch.cuda.is_available():  # the model is loaded on the CPU
            dtype = str(choose_dtype(torch.device("cuda"))).removeprefix("torch.")
        with reporter.stage("load the model", 1):
            loaded = load(model, dtype=dtype, device="cpu")
        check_dtype(loaded.dtype_name)
        setting = replace(setting, dtype=loaded.dtype_name)
        place = place_of(loaded.model, context=context, serving=serving, device=fleet.device, threads=threads)
        time = partial(_timed, loaded, engine, context, setting, serving, reporter)
        table = timed_once(place, time, repetitions=repetitions, rebuild=rebuild, notify=reporter.print)
    shapes = layer_shapes(loaded.model)
    sublayers = sum(curve.seconds[-1] * shapes.count(curve.shape) for curve in table.curves)
    if sublayers > table.whole_seconds:
        reporter.print(
            f"the sublayers add up to {1e3 * sublayers:,.3f} ms, more than the {1e3 * table.whole_seconds:,.3f} ms of"
            " the whole model: the times are too noisy for a budget. Time again, with --rebuild and more --repetitions"
        )
    return table, place


def _timed(
    loaded: LoadedModel, engine: str, context: int, setting: Setting, serving: Serving, reporter: Reporter
) -> LatencyTable:
    shapes = layer_shapes(loaded.model)
    probes = [_Probe(shape, size) for shape in dict.fromkeys(shapes) for size in timed_sizes(shape.units, PARTS)[:-1]]
    removed = sum(shapes.count(p.shape) * (p.shape.units - p.size) * p.shape.unit_params for p in probes)
    numbers = (len(probes) + 1) * sum(parameter.numel() for parameter in loaded.model.parameters()) - removed
    check_room(
        setting.scratch,
        numbers * loaded.dtype.itemsize * (2 if engine == "llama-cpp" else 1),  # GGUF files besides
        f"what {engine} is to serve",
        hint="Free some space, or set TMPDIR to a folder on a larger disk.",
    )
    servers = list[Server]()
    with reporter.stage(f"save the models for {engine}", len(probes) + 1, "models") as stage:
        for model in _saved(loaded, shapes, probes, setting.scratch):
            fleet = ENGINES[engine](setting, [model])  # refuses what it cannot represent before more are saved
            servers += fleet.servers
            stage.advance()
    fleet = replace(fleet, servers=tuple(servers))
    together = fleet.fits_memory()
    turns = "taking turns" if together else "started anew for each turn"
    reporter.print(f"{fleet.version}, {setting.dtype}, {counted(len(fleet.servers), 'server')}, {turns}")
    workload = Workload(setting.requests, context - setting.output_tokens)
    prompts = prompt_maker(loaded.tokenizer)
    found = serve_in_turn(fleet.servers, [workload], prompts, setting, reporter, together=together)
    seconds = {role: np.array([burst.seconds for burst in bursts]) for (role, _), bursts in found.items()}
    whole = Spread.of(seconds[DENSE]).median
    # A machine that gets slower makes the dense model slower too: what counts is the ratio within a repetition.
    times = {role: Spread.of(each / seconds[DENSE] * whole) for role, each in seconds.items()}
    return LatencyTable(
        device=fleet.device,
        threads=setting.threads or 0,
        torch="",
        dtype=setting.dtype,
        context=context,
        model=model_shape(loaded.model),
        curves=tuple(_curve(shape, shapes.count(shape), times) for shape in dict.fromkeys(shapes)),
        whole_seconds=whole,
        repetitions=setting.repetitions,
        serving=serving,
    )


def _saved(
    loaded: LoadedModel, shapes: Sequence[LayerShape], probes: Sequence[_Probe], scratch: Path
) -> Iterator[ServedModel]:
    """Save the dense model and one for each probe, all with the class that pruned models have."""
    prunable = PrunableModel(loaded.model)
    for index, probe in enumerate([None, *probes]):
        sizes = zip(shapes, prunable.dense_units, strict=True)
        kept = [units if probe is None or shape != probe.shape else probe.size for shape, units in sizes]
        prunable.cut(kept, calibrated=False)
        folder = scratch / str(index)
        save_pruned(prunable, loaded.tokenizer, folder)
        yield ServedModel(DENSE if probe is None else probe.role, folder, has_class_file=True)
    prunable.restore()


def _curve(shape: LayerShape, count: int, times: dict[str, Spread]) -> Curve:
    """Times of one of ``count`` sublayers, from those of the models that differ in all of them."""
    sizes = timed_sizes(shape.units, PARTS)
    spreads = [times[_Probe(shape, size).role] for size in sizes[:-1]] + [times[DENSE]]
    without = seconds_without(sizes, [spread.median for spread in spreads])

    def share(seconds: float) -> float:
        return max(LEAST_SECONDS, (seconds - without) / count)

    return Curve.of(
        shape, sizes, [Spread(share(spread.median), share(spread.low), share(spread.high)) for spread in spreads]
    )
