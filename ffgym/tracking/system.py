"""The machine's load while a run goes on, under the names that MLflow's tab *System metrics* shows."""

from __future__ import annotations

import contextlib
import time
from functools import cached_property
from typing import Any

SECONDS = 10.0  # between samples


class SystemMetrics:
    """Samples use of processors, memory, disk, network and GPUs, by MLflow's own monitors.

    MLflow would do so in a thread, which writes into the database behind the run's back.
    """

    def __init__(self) -> None:
        self._next = time.monotonic() + SECONDS

    def sample(self) -> list[tuple[str, float, int]]:
        """Metrics as (name, value, step), the step in seconds of the clock; none where the last are not old yet."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + SECONDS
        step, points = int(time.time()), []
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            points += [(f"system/{name}", value, step) for name, value in monitor.aggregate_metrics().items()]
        return points

    @cached_property
    def _monitors(self) -> list[Any]:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no such package, no such driver, no GPU
            monitors.append(GPUMonitor())
        return monitors
