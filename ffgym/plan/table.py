"""A plan as a table on the terminal, and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ffgym.data.cache import cache_dir, size_limit
from ffgym.plan import counts
from ffgym.plan.plan import Plan
from ffgym.report.layout import Table, humane, text_columns
from ffgym.report.progress import clock
from ffgym.types import JSONDict


def to_json(plan: Plan) -> JSONDict:
    """The plan as plain data: bytes, seconds, operations."""
    shape, load = plan.shape, plan.load
    return {
        "model": plan.name,
        "family": shape.family,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "prunable_parameters": shape.prunable,
        "dtype": load.dtype_name,
        "device": str(plan.device),
        "texts": dict(plan.texts),
        "placement": "stream" if load.streamed else "resident",
        "workers": load.workers,
        "sizes": _sizes(plan),
        "stages": [
            {
                "stage": stage.name,
                "tokens": stage.tokens,
                "operations": stage.operations.total,
                "seconds": plan.seconds(stage),
                "memory": stage.memory,
                "peak": stage.peak,
            }
            for stage in plan.stages
        ],
        "seconds": plan.total_seconds,
        "peak": plan.largest.peak,
        "worker_peak": plan.worker_peak,
        "needed": plan.needed,
        "free": plan.free,
        "fits": plan.fits,
        "advice": plan.advice,
    }


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    shape, load = plan.shape, plan.load
    layers = "streamed" if load.streamed else "resident"
    size = f"{humane(shape.parameters)} parameters"
    if shape.has_experts:
        size += f" ({humane(shape.active_parameters)} active)"
    console.print(Text(f"{plan.name}: {shape.family}, {size}, {load.dtype_name} on {plan.device}, {layers}\n"))
    console.print(_stages(plan))
    console.print(_parts(plan))


def _stages(plan: Plan) -> Table[Sequence[str]]:
    rows = [
        (
            "load model and text" if stage.name == "load" else stage.name,
            f"{stage.tokens:,}" if stage.tokens else "",
            humane(stage.operations.total) if stage.operations.total else "",
            clock(plan.seconds(stage)),
            humane(stage.peak, "B") if stage.peak else "",
            stage.largest_part,
        )
        for stage in plan.stages
    ]
    total = sum(stage.operations.total for stage in plan.stages)
    tokens = sum(stage.tokens for stage in plan.stages)
    rows.append(("in all", f"{tokens:,}", humane(total), clock(plan.total_seconds), humane(plan.largest.peak, "B"), ""))
    return Table(text_columns("stage", "tokens", "operations", "time", "memory", "most of it"), rows)


def _parts(plan: Plan) -> Table[Sequence[str]]:
    sizes = {name.replace("_", " "): humane(size, "B") for name, size in _sizes(plan).items()}
    workers = f", {humane(plan.worker_peak, 'B')} of them by each worker" if plan.load.workers > 1 else ""
    before = " What has been prepared before is opened." if plan.load.is_prepared else ""
    notes = [
        f"Text: {', '.join(f'{role} {text}' for role, text in plan.texts.items())}.",
        f"Memory: {humane(plan.needed, 'B')} are needed{workers}; {humane(plan.free, 'B')} are free on {plan.device}. "
        f"{plan.advice}".strip(),
        f"Disk: {humane(_free_disk(cache_dir()), 'B')} are free for prepared models, "
        f"{humane(_free_disk(plan.output), 'B')} in {plan.output}. {_disk_advice(plan)}".strip(),
        f"Time: at the speed that this machine had just now, {humane(plan.speed.model)} operations a second in the "
        f"model's layers.{before}",
    ]
    return Table(text_columns("what", "size"), list(sizes.items()), notes)


def _disk_advice(plan: Plan) -> str:
    """What is too small for the prepared and the saved model; empty where nothing is."""
    sizes, said = _sizes(plan), list[str]()
    prepared, saved, limit = sizes["prepared_model_on_disk"], sizes["saved_model_on_disk"], size_limit()
    if limit > 0 and prepared > _free_disk(cache_dir()):
        said.append("The prepared model does not fit: set FFGYM_CACHE to a folder on a larger disk.")
    if 0 < limit < prepared:
        said.append(f"It takes more than FFGYM_CACHE_SIZE ({humane(limit, 'B')}): all other prepared models would go.")
    if saved > _free_disk(plan.output):
        said.append("The saved model does not fit: give `ffgym run` a folder on a larger disk with --output.")
    return " ".join(said)


def _sizes(plan: Plan) -> dict[str, int]:
    shape, load = plan.shape, plan.load
    return {
        "weights": counts.weights(shape, load),
        "refit_factors": counts.factors(shape),
        "moments_of_a_layer": counts.moments(shape),
        "hidden_states_of_the_calibration_text": counts.hidden_states(shape, load, load.calibration_tokens),
        "prepared_model_on_disk": counts.store(shape, load),
        "saved_model_on_disk": counts.saved_models(shape, load),
    }


def _free_disk(folder: Path) -> int:
    folder = folder.expanduser().resolve()
    return shutil.disk_usage(next(each for each in [folder, *folder.parents] if each.exists())).free
