"""Progress of long stages on stderr: live bars on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Stage:
    """One running stage; call it with (done, total) or ``advance`` it."""

    def __init__(self, label: str, total: int, console: Console, bars: Progress | None) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._console = console
        self._bars = bars
        self._task = bars.add_task(label, total=total, note="") if bars is not None else None
        self._last = self._begun = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say how far it is, where the total may have become known only now."""
        self.total = total
        self.advance(done - self.done)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by ``steps``; ``note`` is shown behind the bar."""
        self.done = min(self.total, self.done + steps)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=self.total, completed=self.done, note=note)
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            line = f"{self.label}: {self.done}/{self.total} {note}".rstrip()
            if self.done:  # before the first step nobody knows
                left = (self._last - self._begun) / self.done * (self.total - self.done)
                line += f", about {duration(left)} left"
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"`` or ``"3.5 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Where a run says what it is doing.

    Args:
        console: usually on stderr; bars are drawn only where it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Stage]:
        """Show one stage until the block ends, then a line with its duration."""
        begun = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, console=self.console, transient=True) as bars:
                yield Stage(label, total, self.console, bars)
        else:
            yield Stage(label, total, self.console, None)
        self.print(f"{label}: done in {time.monotonic() - begun:.0f} s")

    def print(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
