"""A plan: what a run needs of this machine, stage by stage, and what to change where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ffgym.errors import FitError
from ffgym.plan import counts
from ffgym.plan.counts import Operations, PlannedStage
from ffgym.plan.machine import measure_speed
from ffgym.plan.shape import ModelShape, RunLoad
from ffgym.report.layout import humane
from ffgym.report.progress import clock

TOLERANCE = 1.1  # plans are within 10 % of what is measured, and only what certainly does not fit is refused


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    name: str  # what the user called the model
    shape: ModelShape  # of the model
    load: RunLoad  # what the run does
    device: torch.device  # where the model runs
    free: int  # bytes of that device's memory, or of all GPUs that layers are spread over, that this process may have
    texts: Mapping[str, str]  # what each split is made of, by role
    unstreamable: str = ""  # why its layers cannot be streamed; empty where they can
    output: Path = Path("runs")  # folder that the run is written to, or in which it gets one

    @cached_property
    def stages(self) -> list[PlannedStage]:
        """The stages of the run, in order."""
        return counts.stages(self.shape, self.load)

    @cached_property
    def speed(self) -> Operations:
        """Operations a second of this machine, measured when it is first asked for; that takes about a second."""
        return measure_speed(self.shape, self.load.dtype, self.device, self.load.window)

    @property
    def largest(self) -> PlannedStage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def worker_peak(self) -> int:
        """Bytes that each worker needs: it opens what was prepared, and measures."""
        return max((stage.peak for stage in self.stages if stage.parts), default=0)

    @property
    def needed(self) -> int:
        """Bytes that this process needs at most, and the workers that share its memory."""
        load = self.load
        sharing = load.workers if self.device.type == "cpu" else load.gpu_workers
        return self.largest.peak + (load.workers > 1 and not load.elsewhere) * sharing * self.worker_peak

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.needed <= self.free

    def seconds(self, stage: PlannedStage) -> float:
        """How long a stage takes; a worker takes whole parts, and those without one wait."""
        alone = stage.operations.seconds(self.speed)
        busy = [share * -(-parts // self.processes) / parts for share, parts in stage.parts]
        return stage.seconds + alone * (sum(busy) if busy else 1.0)

    @property
    def processes(self) -> int:
        """Workers that have processors of their own."""
        if self.load.elsewhere or self.device.type != "cpu":
            return self.load.workers
        return max(1, min(self.load.workers, (os.cpu_count() or 1) // torch.get_num_threads()))

    @property
    def total_seconds(self) -> float:
        """How long the run takes."""
        return sum(map(self.seconds, self.stages))

    @property
    def summary(self) -> str:
        """One line: parameters, peak memory, time."""
        return (
            f"plan: {humane(self.shape.parameters)} parameters, {humane(self.needed, 'B')} of memory at the peak "
            f"({humane(self.free, 'B')} free), {clock(self.total_seconds)} in all"
        )

    def check(self) -> None:
        """Raise ``FitError``, with what is needed, what is free and what to change, where the run cannot fit."""
        if self.needed <= TOLERANCE * self.free:
            return
        largest = self.largest
        workers = self.needed - largest.peak
        others = f", workers that share it need {humane(workers, 'B')}" if workers else ""
        raise FitError(
            f"{self.name!r} does not fit: {largest.name} needs {humane(largest.peak, 'B')} of memory, most of it for "
            f"{largest.largest_part}{others}, and {humane(self.free, 'B')} are free on {self.device}",
            hint=self.advice,
        )

    @property
    def advice(self) -> str:
        """What would make it fit; empty where it does."""
        if self.fits:
            return ""
        changes = self._smaller()
        plans = {option: replace(self, load=replace(self.load, **change)) for option, change in changes.items()}
        if enough := [f"{option} ({humane(plan.needed, 'B')})" for option, plan in plans.items() if plan.fits]:
            return f"It fits with {', or with '.join(enough)}."
        together: dict[str, Any] = {key: value for change in changes.values() for key, value in change.items()}
        least = replace(self, load=replace(self.load, **together))
        if changes and least.fits:
            return f"It fits with {' '.join(changes)} ({humane(least.needed, 'B')})."
        with_all = f"; with {' '.join(changes)} it still needs {humane(least.needed, 'B')}" if changes else ""
        pinned = f" Layers cannot be streamed: {self.unstreamable}." if self.unstreamable else ""
        return f"Use a machine with more memory, or a smaller model{with_all}.{pinned}"

    def _smaller(self) -> dict[str, dict[str, Any]]:
        """Changes of the run that save memory: fields of its load, by option."""
        load, found = self.load, dict[str, dict[str, Any]]()
        if load.workers > 1:
            found["--workers 1"] = {"workers": 1}
        if not load.streamed and not self.unstreamable:
            found["--set model.placement=stream"] = {"streamed": True}
        if load.dtype == torch.float32:
            found["--set model.dtype=bfloat16"] = {"dtype": torch.bfloat16}
        if (tokens := load.calibration_tokens // 4) >= 8 * load.window:
            found[f"--set data.calibration_tokens={tokens}"] = {"calibration_tokens": tokens}
        return found
