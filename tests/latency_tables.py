"""Latency tables that nobody has timed: the same numbers on every machine."""

from __future__ import annotations

from typing import Any

from ffgym.costs.latency_fit import timed_sizes
from ffgym.costs.latency_table import Curve, LatencyTable, layer_shapes, model_shape


def made_up_table(model: Any, *, context: int = 64, mlp: float = 8e-3) -> LatencyTable:
    """Attention: 2 ms and 1 ms a unit. MLP: from 1 ms to ``mlp`` more, in steps of four sizes, with noise."""
    curves = []
    for shape in dict.fromkeys(layer_shapes(model)):
        sizes = tuple(timed_sizes(shape.units))
        if shape.kind == "attention":
            seconds = tuple(2e-3 + 1e-3 * size for size in sizes)
        else:
            last = len(sizes) - 1
            seconds = tuple(
                1e-3 + mlp * (i // 4 * 4 / last) + 1e-4 * (-1) ** i * (0 < i < last) for i in range(last + 1)
            )
        curves.append(Curve(shape=shape, sizes=sizes, seconds=seconds, low=seconds, high=seconds))
    return LatencyTable(
        device="made up",
        threads=1,
        torch="0",
        dtype="float32",
        context=context,
        model=model_shape(model),
        curves=tuple(curves),
        whole_seconds=0.05,
        repetitions=1,
    )
