"""Whole-model costs for rows of a table that nobody has measured."""

from __future__ import annotations

from ffgym.costs.resource import resource_named, standard_resources
from ffgym.report.table import Cost


def table_costs(*values: float) -> tuple[Cost, ...]:
    """Parameters, MACs per token and KV bytes per token as a row holds them."""
    resources = [resource_named(name) for name in standard_resources()]
    return tuple(Cost(r.name, r.column, value, r.text(value)) for r, value in zip(resources, values, strict=True))
