"""What a resource is, and what the units of a model cost in it.

A resource has a price per unit, or it measures what every number of units costs. All others get the numbers from here,
so that a resource is one file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ffgym.errors import BudgetError, PluginError
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.built_ins import BUILTINS
from ffgym.types import Notify, OnStep, Sublayer, do_nothing

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class CostSetting:
    """What costs depend on, apart from the model's shape.

    Attributes:
        context: tokens attended to: ``prune.context``.
        number_bytes: bytes of one weight, and of one number in the KV cache.
    """

    context: int
    number_bytes: int


@dataclass(frozen=True)
class Measurement:
    """How costs were measured: what a run reports and keeps, so that the same costs can be used again.

    Attributes:
        summary: where and how, in one line without a full stop.
        digest: equal digests, equal costs.
        text: the file ``NAME.json`` in the run's folder; `Resource.measure` gets it back as ``file`` on ``--resume``.
    """

    summary: str
    digest: str
    text: str


@dataclass(frozen=True)
class Costs:
    """What one dense model costs in one resource.

    Attributes:
        tables: what keeping k = 0 .. units units of each sublayer costs, each shape (units + 1,), non-decreasing from 0
            or more. Whole numbers keep sums exact.
        rest: what the model costs without its prunable units.
        measurement: how that was measured; ``None`` where it was computed.
    """

    tables: Sequence[np.ndarray]
    rest: float = 0
    measurement: Measurement | None = None

    def of(self, kept: Sequence[int]) -> float:
        """What the whole model costs with ``kept`` units per sublayer, length 2L; an int where all numbers are."""
        total: float = self.rest + sum(table[k].item() for table, k in zip(self.tables, kept, strict=True))
        return total


class Resource(Plugin):
    """What a budget counts. A subclass defines ``unit_price``, or ``measure`` where no price per unit exists.

    Attributes:
        quantity: its name in a model card: "20 % of the *KV-cache bytes* of its sublayers"; ``name`` where empty.
        unit: of a cost; whole-model costs are written with an SI prefix.
        column: head of its column in the table of a run; empty for none.
    """

    kind = "resource"
    quantity: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    column: ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if cls.unit_price is Resource.unit_price and not cls.is_measured():
            raise TypeError(f"{cls.__qualname__} defines neither unit_price nor measure")

    @classmethod
    def is_measured(cls) -> bool:
        """Whether costs come from ``measure``."""
        return cls.measure is not Resource.measure

    def unit_price(self, sublayer: Sublayer, setting: CostSetting) -> float:
        """What one unit of a sublayer costs: finite, 0 or more."""
        raise NotImplementedError

    def rest(self, model: Any, setting: CostSetting) -> float:
        """What a dense causal LM costs without its prunable units, where there is a price per unit."""
        return 0

    def measure(
        self, model: Any, setting: CostSetting, *, file: Path | None, on_progress: OnStep, notify: Notify
    ) -> Costs:
        """Measure a dense causal LM and leave it as it was; the result has a ``measurement``.

        Args:
            model: in eval mode.
            setting: what else costs depend on.
            file: an earlier measurement to use instead: a resumed run's, or for latency ``prune.latency_table``.
            on_progress: called with (steps done, steps).
            notify: called with lines for the user.
        """
        raise NotImplementedError

    def text(self, cost: float) -> str:
        """A whole-model cost as tables print it."""
        from ffgym.report.layout import humane

        return humane(cost, self.unit)


def resource_named(name: str) -> Resource:
    """The resource of that name; errors as `manager.create`."""
    return cast("Resource", manager.create("resource", name))


def resource_class(name: str) -> type[Resource]:
    """The class of that name; errors as `manager.get_class`."""
    return cast("type[Resource]", manager.get_class("resource", name))


def standard_resources() -> list[str]:
    """The built-in resources that need no measurement: every table of a run shows them."""
    return [name for name in BUILTINS["resource"] if not resource_class(name).is_measured()]


def measured_resources() -> list[str]:
    """Every resource that has to be measured: a run keeps the measurement in its folder, as ``NAME.json``."""
    return [name for name in manager.names("resource") if resource_class(name).is_measured()]


def costs_of(
    resource: Resource,
    model: Any,
    *,
    context: int,
    file: Path | None = None,
    on_progress: OnStep = do_nothing,
    notify: Notify = do_nothing,
) -> Costs:
    """What a dense causal LM costs in a resource; see `Resource.measure` for the arguments.

    Raises:
        PluginError: the resource failed, or its costs are invalid.
        BudgetError, ConfigError: a built-in refuses the model or the file.
    """
    import numpy as np

    from ffgym.models.families import family_of
    from ffgym.plugins.contracts import call_plugin
    from ffgym.plugins.manager import described
    from ffgym.pruning.budget import check_tables

    setting = CostSetting(context, number_bytes=model.get_output_embeddings().weight.element_size())
    sublayers, who = family_of(model).sublayers(model), described(resource)

    def number(value: Any, what: str) -> float:
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise PluginError(f"{who}: {what} is {value!r}, not a finite number")
        return cast("float", value.item()) if isinstance(value, np.number) else value

    def ask() -> Costs:
        if resource.is_measured():
            return resource.measure(model, setting, file=file, on_progress=on_progress, notify=notify)
        prices = [number(resource.unit_price(s, setting), f"unit_price of {s.name}") for s in sublayers]
        tables = [np.arange(s.units + 1) * price for s, price in zip(sublayers, prices, strict=True)]
        return Costs(tables, resource.rest(model, setting))

    costs = call_plugin(resource, ask, "saying what units cost")
    expected = Measurement if resource.is_measured() else type(None)
    if not isinstance(costs, Costs) or not isinstance(costs.measurement, expected):
        raise PluginError(f"{who}: measure returned no Costs with a measurement")
    for key, value in vars(costs.measurement).items() if costs.measurement else ():
        if not isinstance(value, str):
            raise PluginError(f"{who}: {key} of its Measurement is {value!r}, not text")
    try:
        costs = replace(costs, tables=list(map(np.asarray, costs.tables)), rest=number(costs.rest, "rest"))
        check_tables(sublayers, costs.tables)
    except BudgetError as error:
        raise PluginError(f"{who}: {error.message}", hint=error.hint) from error
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who}: its tables are not arrays of numbers: {error}") from error
    if not any(table[-1] > 0 for table in costs.tables):
        raise PluginError(f"{who}: no unit costs anything, so pruning would save nothing")
    text = call_plugin(resource, lambda: resource.text(costs.of([s.units for s in sublayers])), "writing a cost")
    if not isinstance(text, str):
        raise PluginError(f"{who}: text returned {type(text).__name__}, not a string")
    return costs


def standard_costs(model: Any, *, context: int) -> dict[str, Costs]:
    """What a dense causal LM costs in every standard resource, by name."""
    return {name: costs_of(resource_named(name), model, context=context) for name in standard_resources()}
