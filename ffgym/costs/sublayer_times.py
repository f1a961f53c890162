"""Time the sublayers of a model at a grid of sizes: the numbers of a latency table.

One copy of each shape of sublayer is cut to one size after another, and called with the arguments that an ordinary
call of the model passed to it. Repetitions are interleaved: every round times all sizes, and the whole model, once, in
a new random order, so that whatever else the machine does affects all of them alike.
"""

from __future__ import annotations

import copy
import functools
import math
import platform
import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ffgym.costs.latency_fit import timed_sizes
from ffgym.costs.latency_table import Curve, LatencyTable, LayerShape, layer_shapes, model_shape
from ffgym.costs.timing import Spread, timed
from ffgym.models.families import Family, family_of
from ffgym.models.placement import devices_of
from ffgym.models.sublayer import PrunableSublayer
from ffgym.models.walk import arguments_of
from ffgym.types import OnStep, do_nothing

REPETITIONS = 9
# A call that takes less than this is repeated several times in a row, after one that is not timed. Otherwise the clock,
# the queue and cold caches after the cut would be a large part of its time.
LEAST_SECONDS = 5e-3
MOST_CALLS = 100

Call = Callable[[], object]


@dataclass(frozen=True)
class _Probe:
    """One shape of sublayer, ready to be called at any size."""

    shape: LayerShape
    half: PrunableSublayer
    call: Call
    devices: set[torch.device]

    def seconds(self, units: int, calls: int = 1) -> float:
        """Seconds of one of ``calls`` forward passes with ``units`` units kept."""
        self.half.cut(units, calibrated=False)
        return _seconds(self.call, calls, self.devices)


@torch.inference_mode()
def time_model(model: Any, *, context: int, repetitions: int, on_progress: OnStep = do_nothing) -> LatencyTable:
    """Time every shape of sublayer at a grid of sizes, and the whole dense model.

    Args:
        model: dense causal LM in eval mode; it is left as it was.
        context: tokens in the window; the model must take as many.
        repetitions: rounds that count, after one that warms up.
        on_progress: called with (rounds done, rounds).

    Raises:
        ModelError: an unsupported architecture.
    """
    ids = torch.arange(context).remainder(model.get_input_embeddings().num_embeddings)[None]
    ids = ids.to(model.get_input_embeddings().weight.device)
    devices = devices_of(model)

    def whole() -> object:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1:])

    probes = _probes(model, ids)
    points = [(probe, units) for probe in probes for units in timed_sizes(probe.shape.units)]
    rng = np.random.default_rng(0)

    # Warms up, and says how many calls make a sample.
    calls = [_calls(probe.seconds(units, 2)) for probe, units in points]
    whole_calls = _calls(_seconds(whole, 2, devices))
    times = np.empty((repetitions, len(points)))
    whole_times = np.empty(repetitions)
    for repetition in range(repetitions):
        on_progress(repetition + 1, repetitions + 1)
        for index in rng.permutation(len(points)).tolist():
            probe, units = points[index]
            times[repetition, index] = probe.seconds(units, calls[index])
        whole_times[repetition] = _seconds(whole, whole_calls, devices)
    on_progress(repetitions + 1, repetitions + 1)
    first = model.get_output_embeddings().weight
    return LatencyTable(
        device=processors(model),
        threads=threads_of(first.device),
        torch=torch.__version__,
        dtype=str(first.dtype).removeprefix("torch."),
        context=context,
        model=model_shape(model),
        curves=tuple(
            Curve.of(
                probe.shape,
                timed_sizes(probe.shape.units),
                [Spread.of(column) for (owner, _), column in zip(points, times.T, strict=True) if owner is probe],
            )
            for probe in probes
        ),
        whole_seconds=Spread.of(whole_times).median,
        repetitions=repetitions,
    )


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    name = None
    with suppress(OSError):  # not Linux
        name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), flags=re.MULTILINE)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name[1].strip() if name else platform.processor() or platform.machine()} ({capability})"


def processors(model: Any) -> str:
    """The processors of a model, e.g. ``"NVIDIA H100 80GB HBM3 x 2"``: the kind of its last device, and how many."""
    count = len(devices_of(model))
    return processor(model.get_output_embeddings().weight.device) + (f" x {count}" if count > 1 else "")


def threads_of(device: torch.device) -> int:
    """How many CPU threads compute; 0 on an accelerator."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def _seconds(call: Call, calls: int, devices: set[torch.device]) -> float:
    """Seconds of one of several calls: their median on a CPU, where others may interrupt; else their mean."""
    if calls > 1:
        call()
    if all(device.type == "cpu" for device in devices):
        return statistics.median(timed(call, devices)[1] for _ in range(calls))

    def queued() -> None:  # as in a model: one call is prepared while another is computed
        for _ in range(calls):
            call()

    return timed(queued, devices)[1] / calls


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(LEAST_SECONDS / seconds)))


# --- calling a sublayer by itself -------------------------------------------------------------------------------------


def _probes(model: Any, ids: torch.Tensor) -> list[_Probe]:
    """One probe for each shape of sublayer, on copies, so that the model stays as it is."""
    family = family_of(model)
    layers, sublayers = family.layers(model), family.sublayers(model)
    first: dict[LayerShape, int] = {}
    for index, shape in enumerate(layer_shapes(model)):
        first.setdefault(shape, index)
    probes = []
    for shape, index in first.items():
        sublayer = sublayers[index]
        layer = layers[sublayer.layer]
        # The module whose arguments are the sublayer's: the attention module, or the MLP's first producer.
        entered = _attention(family, layer) if shape.kind == "attention" else family.producers(layer, "mlp")[0]
        args, kwargs = arguments_of(entered, lambda: model.base_model(input_ids=ids, use_cache=False))
        twin = _copied(layer)
        call = _attention(family, twin) if shape.kind == "attention" else family.mlp(twin)
        half = PrunableSublayer(family, twin, sublayer)
        probes.append(_Probe(shape, half, functools.partial(call, *args, **kwargs), devices_of(twin)))
    return probes


def _copied(layer: nn.Module) -> nn.Module:
    """A copy of a decoder layer, without what accelerate's hooks share with the rest of the model: tied embeddings."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    shared = (getattr(hook, "tied_params_map", None) for hook in hooks)
    return copy.deepcopy(layer, {id(tied): tied for tied in shared if tied is not None})


def _attention(family: Family, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(family.attention_consumer.rpartition(".")[0])
