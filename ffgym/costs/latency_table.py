"""The latency table: how long each kind of sublayer takes at each size on one machine, and the costs that follow.

A table is timed once (`ffgym.costs.sublayer_times`, or in an engine by `ffgym.measure.served_latency`), kept as JSON,
and recorded with every run that uses it. The same table gives the same costs, and so the same allocations, on any
machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ffgym.costs.latency_fit import PICOSECONDS, cost_table
from ffgym.costs.resource import Costs, Measurement
from ffgym.costs.timing import Spread
from ffgym.errors import BudgetError, ConfigError
from ffgym.files import FileFormat, Positive, Strict, json_digest
from ffgym.models.families import family_of
from ffgym.report.layout import counted
from ffgym.types import Kind, Sublayer

FORMAT: Literal["ffgym latency table 1"] = "ffgym latency table 1"
Size = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class ModelShape(Strict):
    """What decides how long the rest of a forward pass takes, everything but attentions and MLPs.

    Attributes:
        family: e.g. ``"llama"``.
        hidden: channels of the residual stream.
        layers: decoder layers.
        vocabulary: rows of the output head.
    """

    family: str
    hidden: Positive
    layers: Positive
    vocabulary: Positive


class LayerShape(Strict):
    """What decides how long a sublayer takes at each size: all sublayers of one shape share a curve.

    Attributes:
        units: of the dense sublayer.
        channels_per_unit: input columns of the consumer that a unit owns.
        unit_params: parameters that go with a unit, biases included.
        query_heads_per_unit: query heads in a KV group; 0 for an MLP.
        head_dim: channels of a head; 0 for an MLP.
        attends: what the config calls this layer's attention, e.g. ``"sliding_attention"``; empty for an MLP, and
            where all layers attend to everything.
    """

    kind: Kind
    units: Positive
    channels_per_unit: Positive
    unit_params: Positive
    query_heads_per_unit: Size
    head_dim: Size
    attends: str


class Curve(Strict):
    """Times of one shape of sublayer.

    Attributes:
        shape: whose.
        sizes: units kept, strictly increasing from 1 to all of them.
        seconds: median time of one forward pass at each size; of an engine, the share of a burst.
        low: first quartiles, or the lowest times of fewer than 4 repetitions.
        high: third quartiles, or the highest times.
    """

    shape: LayerShape
    sizes: tuple[Positive, ...]
    seconds: tuple[Seconds, ...]
    low: tuple[Seconds, ...]
    high: tuple[Seconds, ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> Curve:
        sizes, units = self.sizes, self.shape.units
        rises = all(a < b for a, b in itertools.pairwise(sizes))
        if not sizes or not rises or (sizes[0], sizes[-1]) != (1, units):
            raise ValueError(f"sizes must rise from 1 to {units}")
        if {len(self.seconds), len(self.low), len(self.high)} != {len(sizes)}:
            raise ValueError("one median time, a low and a high one belong to every size")
        return self

    @classmethod
    def of(cls, shape: LayerShape, sizes: Sequence[int], times: Sequence[Spread]) -> Curve:
        """The curve of measured times, one for each size."""
        seconds, low, high = zip(*((time.median, time.low, time.high) for time in times), strict=True)
        return cls(shape=shape, sizes=tuple(sizes), seconds=seconds, low=low, high=high)

    @property
    def costs(self) -> np.ndarray:
        """Cost of keeping 0 .. units units, shape (units + 1,), whole picoseconds (`ffgym.costs.latency_fit`)."""
        return cost_table(self.sizes, self.seconds)


class Serving(Strict):
    """The engine that times were taken in, and what it was asked: bursts of requests of ``context`` tokens each.

    Attributes:
        engine: with its version.
        requests: at the same moment.
        output_tokens: of every answer; the rest of the context is the prompt.
        arguments: of the engine, beyond ffgym's own.
    """

    engine: str
    requests: Positive
    output_tokens: Positive
    arguments: tuple[str, ...]


class LatencyTable(Strict):
    """Times of a model's sublayers and how they were taken.

    They are shares of a forward pass of one window of ``context`` tokens or, of an engine, of a burst of requests.

    Attributes:
        device: the processor's or the GPU's name.
        threads: threads of a CPU; 0 for an accelerator, and where an engine chose them.
        torch: its version; empty for an engine.
        context: tokens in the window, or of a request with its answer.
        model: what was timed.
        curves: one for each shape of sublayer.
        whole_seconds: median time of the dense model, logits of the last token only in a forward pass.
        repetitions: how many times each was timed; the first, which warms up, aside.
        serving: how an engine was asked; ``None`` for forward passes.
    """

    format: Literal["ffgym latency table 1"] = FORMAT
    device: str
    threads: Size
    torch: str
    dtype: str
    context: Positive
    model: ModelShape
    curves: tuple[Curve, ...] = Field(min_length=1)
    whole_seconds: Seconds
    repetitions: Positive
    serving: Serving | None = None

    @model_validator(mode="after")
    def _has_a_curve_for_each_shape(self) -> LatencyTable:
        if len({curve.shape for curve in self.curves}) < len(self.curves):
            raise ValueError("two curves have the same shape")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it: equal digests, equal allocations."""
        return json_digest(self.model_dump(mode="json", exclude_none=True))

    @property
    def measured(self) -> str:
        """How the times were taken, in one line."""
        threads = f", {counted(self.threads, 'thread')}" if self.threads else ""
        if self.serving is None:
            return f"{self.device}{threads}, {self.dtype}, torch {self.torch}, one window of {self.context:,} tokens"
        asked, answers = self.serving, self.serving.output_tokens
        more = f", {' '.join(asked.arguments)}" if asked.arguments else ""
        return (
            f"{asked.engine}, {self.device}{threads}, {self.dtype}{more}, {counted(asked.requests, 'request')} at the"
            f" same moment, prompts of {self.context - answers:,} tokens and answers of {answers:,}"
        )

    @property
    def noise(self) -> float:
        """Distance of the ends of a spread as a share of the median time, the median over all times."""
        times = [(c.high[i] - c.low[i]) / c.seconds[i] for c in self.curves for i in range(len(c.sizes))]
        return float(np.median(times))

    def costs(self, model: Any) -> Costs:
        """What a model that the table fits costs, in picoseconds, whole ones in its tables; see `check_fits`."""
        of_shape = {curve.shape: curve.costs for curve in self.curves}
        tables = [of_shape[shape] for shape in layer_shapes(model)]
        rest = max(0.0, self.whole_seconds * PICOSECONDS - sum(float(table[-1]) for table in tables))
        return Costs(tables, rest, Measurement(self.measured, self.digest, to_json(self)))

    def check_fits(self, model: Any, *, context: int, source: str) -> None:
        """Raise ``BudgetError``, naming what differs, where the table is for another model or ``prune.context``.

        ``source`` is the table's name in messages.
        """
        differences = _differences(self.model, model_shape(model))
        known = [curve.shape for curve in self.curves]
        for wanted in dict.fromkeys(layer_shapes(model)):
            same_kind = [shape for shape in known if shape.kind == wanted.kind]
            if wanted not in known:
                nearest = min((_differences(shape, wanted) for shape in same_kind), key=len, default=["no times"])
                differences += [f"{wanted.kind}: {difference}" for difference in nearest]
        if differences:
            raise BudgetError(
                f"latency table {source} was timed on another model: {'; '.join(differences)}",
                hint="Leave prune.latency_table out to time this model, or make a table for it with: ffgym latency"
                " MODEL --output FILE",
            )
        if self.context != context:
            raise BudgetError(
                f"latency table {source} was timed on {self.context} tokens, prune.context is {context}",
                hint=f"Use --set prune.context={self.context}, or a table of {context} tokens.",
            )


def model_shape(model: Any) -> ModelShape:
    """The shape of a dense causal LM; raises ``ModelError`` where its family is not supported."""
    family = family_of(model)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    return ModelShape(
        family=family.name, hidden=int(hidden), layers=len(family.layers(model)), vocabulary=int(vocabulary)
    )


def layer_shapes(model: Any) -> list[LayerShape]:
    """The shapes of the 2L sublayers of a dense causal LM, in order of depth."""
    types = getattr(model.config, "layer_types", None)
    return [_layer_shape(s, str(types[s.layer]) if types else "") for s in family_of(model).sublayers(model)]


def _layer_shape(sublayer: Sublayer, layer_type: str) -> LayerShape:
    if sublayer.kind == "experts":
        raise BudgetError(
            f"{sublayer.name} takes a time that depends on the tokens that it is sent, so no table says what it costs",
            hint="Use --resource params for models with mixtures of experts.",
        )
    return LayerShape(
        kind=sublayer.kind,
        units=sublayer.units,
        channels_per_unit=sublayer.channels_per_unit,
        unit_params=sublayer.unit_params,
        query_heads_per_unit=sublayer.query_heads_per_unit,
        head_dim=sublayer.head_dim,
        attends=layer_type if sublayer.kind == "attention" and layer_type != "full_attention" else "",
    )


LATENCY_TABLE = FileFormat(
    "latency table",
    LatencyTable,
    ConfigError,
    "Make one with: ffgym latency MODEL --output FILE, or take latency.json from the folder of a run.",
)


def read_table(path: Path) -> LatencyTable:
    """Read a table that `ffgym latency --output`, a run or the cache wrote; anything else is a ``ConfigError``."""
    return LATENCY_TABLE.read(path)


def to_json(table: LatencyTable) -> str:
    """The text of a table's file; `read_table` gives the same table back, bit for bit."""
    return table.model_dump_json(indent=1, exclude_none=True) + "\n"


def _differences(there: Strict, here: Strict) -> list[str]:
    """``"layers 30, here 3"`` for every field that differs."""
    pairs = ((name, getattr(there, name), getattr(here, name)) for name in type(there).model_fields)
    return [f"{name} {was!r}, here {now!r}" for name, was, now in pairs if was != now]
