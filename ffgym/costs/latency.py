"""Latency: how long a model takes on one machine or in one engine, from times of its sublayers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffgym.costs.resource import Costs, CostSetting, Resource
from ffgym.types import Notify, OnStep


class Latency(Resource):
    """Picoseconds of a forward pass of one window of ``context`` tokens or, of an engine, of a burst of requests.

    The times are those of a named file, or else this machine's own forward passes from the cache, timed now if they
    are missing.
    """

    name = "latency"
    quantity = "measured latency"

    def measure(
        self, model: Any, setting: CostSetting, *, file: Path | None, on_progress: OnStep, notify: Notify
    ) -> Costs:
        """Costs by a latency table.

        Raises:
            ConfigError: the named file is no latency table.
            BudgetError: it is for another model or context, or the model takes fewer than ``context`` tokens.
        """
        from ffgym.costs.latency_cache import cached_table, notify_if_busy
        from ffgym.costs.latency_table import read_table

        if file is None:
            table = cached_table(model, context=setting.context, on_progress=on_progress, notify=notify)
        else:
            table = read_table(file)
            table.check_fits(model, context=setting.context, source=str(file))
            notify_if_busy(table, notify)
        return table.costs(model)
