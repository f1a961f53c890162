"""``measure(folder)``: how much smaller and faster a saved model is than the dense one it was made from.

which models -> load both -> do they belong together -> sizes -> speed, in turn -> memory, each alone

``latency_table(model, context)``: how long the sublayers of a dense model take on this machine, for a latency budget.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from ffgym.costs.latency_cache import cached_table, check_context, place_of
from ffgym.costs.latency_table import LatencyTable
from ffgym.costs.resource import standard_costs
from ffgym.costs.size import SizeMeter
from ffgym.costs.sublayer_times import REPETITIONS, processor, threads_of
from ffgym.costs.timing import computing_threads
from ffgym.errors import ConfigError, ModelError, raising_if_out_of_memory
from ffgym.measure.memory import MemoryProbe, measure_memory
from ffgym.measure.pairs import units_kept
from ffgym.measure.speed import DECODE_TOKENS, Speed, Workload, parameter_bytes, time_in_turn, work_of
from ffgym.measure.table import Footprint, Measurement
from ffgym.models.checkpoint import model_folder, weights_on_disk
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import LoadedModel, checkpoint_folder, context_limit, load
from ffgym.models.modes import own_modes
from ffgym.models.origin import DenseModel, dense_model
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter

LENGTHS = (128, 512, 1024)


@own_modes()
def measure(
    folder: Path,
    dense: str | None = None,
    batch_sizes: Sequence[int] = (1, 4),
    prompt_lengths: Sequence[int] | None = None,
    *,
    repetitions: int = 7,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Measurement:
    """Measure a saved model beside the dense one: what ``ffgym measure`` shows.

    Raises:
        ModelError: a folder that is no model, two models that do not belong together, or one that cannot be loaded.
        ConfigError: no record of the dense model, or prompts that are too long for the models.
    """
    reporter = Reporter()
    folder = model_folder(folder)
    source = dense_model(folder, dense)
    with source.named():
        limits = context_limit(source.name, revision=source.revision), context_limit(str(folder))
    workloads = _workloads(batch_sizes, prompt_lengths, min(limits))
    with computing_threads(threads):
        found = _side_by_side(folder, source, workloads, repetitions, dtype, device, reporter)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return _with_memory(found, device, folder, source, reporter)


@own_modes()
def latency_table(
    model: str,
    context: int,
    *,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    repetitions: int = REPETITIONS,
    rebuild: bool = False,
) -> tuple[LatencyTable, Path]:
    """The latency table of a model on this machine, and where the cache keeps it: what ``ffgym latency`` shows.

    Raises:
        ModelError: a model that cannot be loaded, or that is pruned already.
        BudgetError: it takes fewer tokens than ``context``.
    """
    check_context(context, context_limit(model))  # loading a large model takes minutes
    reporter = Reporter()
    with computing_threads(threads):
        with reporter.stage("load the model", 1):
            loaded = load(model, dtype=dtype, device=device)
        with reporter.stage("time the sublayers", repetitions + 1) as stage:
            table = cached_table(
                loaded.model,
                context=context,
                rebuild=rebuild,
                repetitions=repetitions,
                on_progress=stage,
                notify=reporter.print,
            )
        return table, place_of(loaded.model, context=context)


def _side_by_side(
    folder: Path,
    source: DenseModel,
    workloads: Sequence[Workload],
    repetitions: int,
    dtype: str,
    device: str,
    reporter: Reporter,
) -> Measurement:
    """Everything that is measured with both models in this process; they are gone when it returns."""
    with reporter.stage("load both models", 2) as stage:
        pruned = load(str(folder), dtype=dtype, device=device)
        stage.advance()
        with source.named():
            dense = load(source.name, revision=source.revision, dtype=pruned.dtype_name, device=device)
        kept = units_kept(pruned.model, dense.model)
    reporter.print(f"dense: {dense.description}, named by {source.said_by}; pruned: {folder}")
    reporter.print(f"{processor(dense.device)}, {counted(torch.get_num_threads(), 'thread')}, {dense.dtype_name}")
    prunable = PrunableModel(dense.model)

    def meter(context: int) -> SizeMeter:
        return SizeMeter(prunable, standard_costs(prunable.model, context=context))

    context = max(workload.length for workload in workloads)
    sizes, dense_folder = meter(context), checkpoint_folder(source.name, revision=source.revision)
    speeds: list[Speed] = []
    with reporter.stage("speed, in turn", 2 * (repetitions + 1) * len(workloads)) as stage:
        for workload in workloads:
            before = work_of(dense.model, prunable.dense_units, meter, workload)
            after = work_of(pruned.model, kept, meter, workload)
            ceilings = before[0] / after[0], before[1] / after[1]
            short = ModelError(
                f"prompts of {workload.batch} x {workload.length} tokens do not fit the device's memory beside both"
                " models",
                hint="Use smaller --batch-sizes or --prompt-lengths, or --device cpu.",
            )
            with raising_if_out_of_memory(short):
                speeds += time_in_turn(
                    dense.model, pruned.model, workload, ceilings, repetitions=repetitions, on_turn=stage.advance
                )
    largest = max(workloads, key=lambda workload: (workload.batch * workload.length, workload.length))
    return Measurement(
        dense=_footprint(dense, sizes(prunable.dense_units), dense_folder),
        pruned=_footprint(pruned, sizes(kept), folder),
        speeds=tuple(speeds),
        context=context,
        memory_work=(largest.batch, largest.length),
        device=processor(dense.device),
        threads=threads_of(dense.device),
        dtype=dense.dtype_name,
        torch=torch.__version__,
        transformers=version("transformers"),
        repetitions=repetitions,
    )


def _with_memory(found: Measurement, device: str, folder: Path, source: DenseModel, reporter: Reporter) -> Measurement:
    """Add the peak memory of both, each in a fresh process."""
    batch, length = found.memory_work
    models = ((found.dense, source.name, source.revision), (found.pruned, str(folder), None))
    footprints: list[Footprint] = []
    with reporter.stage("peak memory, each alone", len(models)) as stage:
        for footprint, name, revision in models:
            probe = MemoryProbe(name, revision, found.dtype, device, torch.get_num_threads(), batch, length)
            footprints.append(replace(footprint, memory=measure_memory(probe)))
            stage.advance()
    dense, pruned = footprints
    return replace(found, dense=dense, pruned=pruned)


def _workloads(batch_sizes: Sequence[int], lengths: Sequence[int] | None, limit: int) -> list[Workload]:
    """Every batch size with every prompt length."""
    room = limit - DECODE_TOKENS
    if lengths is None:
        lengths = [length for length in LENGTHS if length <= room] or [max(1, room)]
    if max(lengths) > room:
        raise ConfigError(
            f"--prompt-lengths {max(lengths)}: the models take at most {limit} tokens, and {DECODE_TOKENS} of them are "
            "decoded behind the prompt",
            hint=f"Use at most {room}.",
        )
    return [Workload(batch, length) for batch in batch_sizes for length in lengths]


def _footprint(loaded: LoadedModel, size: Mapping[str, float], folder: Path) -> Footprint:
    disk_bytes, disk_dtype = weights_on_disk(folder)
    return Footprint(
        model=loaded.description,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        weight_bytes=parameter_bytes(loaded.model),
        disk_bytes=disk_bytes,
        disk_dtype=disk_dtype,
        macs=size["macs"],
        kv_bytes=size["kv"],
        memory=None,
    )
