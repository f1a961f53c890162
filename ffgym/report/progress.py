"""Progress of long jobs on stderr: two live lines on a terminal, a plain line now and then anywhere else.

A terminal shows how far the whole job is, and below it the stage at work::

    stage 3/8  search: reinforce  ━━━━━━━━━━━━━━━━━━━━━━━━  4:05 left in all
    8,192/229,376 tokens · reward 0.168 · 0:09 elapsed · 3:32 left
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
# The pace so far counts as much as half a minute of the step at work, or a twentieth of a shorter job.
SECONDS_OF_TRUST, SHARE_OF_TRUST = 30.0, 0.05


@dataclass(frozen=True)
class Step:
    """A part of a job, of which it is known beforehand about how long it takes."""

    label: str  # what the labels of its stages begin with
    seconds: float  # that are planned for it
    stages: int = 1  # how many stages it consists of
    computes: bool = True  # how long it takes says something about the other steps; fetching files says nothing


class _Plan:
    """How far a job is in all its steps.

    What it has left is planned seconds times the pace, seconds taken per second planned: that of the step at work, and
    in its first half minute mostly that of the steps before, so that it follows a machine that others use too.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._place = self._stages = 0
        self._all = sum(step.seconds for step in steps)
        self._begun = time.monotonic()  # the step at work
        self._saved = 0.0  # planned seconds of it that an earlier session's work saves
        self._pace_before = 1.0

    def enter(self, label: str) -> bool:
        """Move on to the step that a stage belongs to, if there is one from here on."""
        for place in range(self._place, len(self._steps)):
            if label.startswith(self._steps[place].label):
                if place > self._place:
                    self._pace_before = self._pace(1.0)
                    self._begun, self._saved = time.monotonic(), 0.0
                self._stages = self._stages + 1 if place == self._place else 1
                self._place = place
                return True
        return False

    def save(self, share: float) -> None:
        """Note that so much of the stage at work is known from an earlier session: it takes no time."""
        step = self._steps[self._place]
        self._saved += share * step.seconds / step.stages

    def wait(self, seconds: float) -> None:
        """Note that nothing was done for so long."""
        self._begun += seconds

    def head(self) -> str:
        return f"stage {self._place + 1}/{len(self._steps)}"

    def share(self, within: float) -> float:
        """The share of the whole job that is done, given that of the stage at work."""
        return (self._before() + self._own(within)) / self._all

    def left(self, within: float) -> float:
        """Seconds until the job ends."""
        return self._pace(within) * (self._all - self._before() - self._own(within))

    def _pace(self, within: float) -> float:
        if not self._steps[self._place].computes:
            return self._pace_before
        trust = min(SECONDS_OF_TRUST, SHARE_OF_TRUST * self._all)
        seen = time.monotonic() - self._begun
        return (seen + trust * self._pace_before) / (max(0.0, self._own(within) - self._saved) + trust)

    def _before(self) -> float:
        """Planned seconds of the steps before the one at work."""
        return sum(step.seconds for step in self._steps[: self._place])

    def _own(self, within: float) -> float:
        """Planned seconds of what is done of the step at work."""
        step = self._steps[self._place]
        return min(1.0, max(0.0, self._stages - 1 + within) / step.stages) * step.seconds


class StageProgress:
    """One running stage; call it with (done, total) or ``advance`` it."""

    def __init__(self, label: str, total: int, unit: str, console: Console, plan: _Plan | None) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._known, self._partly = 0, 0.0
        self._unit, self._note = unit, ""
        self._console, self._plan = console, plan
        self._last = self._begun = time.monotonic()
        self._waited, self._is_waiting = 0.0, False
        self.start_seconds = 0.0  # before the clock was started again

    def __call__(self, done: int, total: int) -> None:
        """Say how far it is, where the total may have become known only now; 0 done, and the clock starts again."""
        if done == 0:
            self.restart()
        self.total = total
        self.advance(done - self.done)

    def restart(self) -> None:
        """Start the clock again: what went before, such as importing libraries, says nothing of the pace."""
        now = time.monotonic()
        self.start_seconds += now - self._begun
        self._begun, self._waited = now, 0.0

    def advance(self, steps: int = 1, note: str = "", *, is_known: bool = False) -> None:
        """Move on.

        Args:
            is_known: these steps are those of an earlier session, and say nothing of how long the others will take.
        """
        self.done = min(self.total, self.done + steps)
        self._partly = max(0.0, self._partly - steps)
        if is_known:
            self._known += steps
            if self._plan is not None:
                self._plan.save(steps / self.total)
        if note and not self._note and not steps:  # what it begins with may take minutes
            self._last = -math.inf
        self._note = note or self._note
        self._print_line()

    def partly(self, steps: float) -> None:
        """Say how many further steps are under way that are counted when they end.

        Until there is a first one, 0 says that it has not begun, as while workers load: nobody knows how long that
        takes, and it says nothing of the pace.
        """
        self._is_waiting = not steps and self.done == self._known
        if self._is_waiting:
            waited = time.monotonic() - self._begun
            if self._plan is not None:
                self._plan.wait(waited - self._waited)
            self._waited = waited
        self._partly = min(steps, self.total - self.done)
        self._print_line()

    @property
    def share(self) -> float:
        """How much of it is done."""
        return (self.done + self._partly) / max(1, self.total)

    def status(self) -> str:
        """``8,192/229,376 tokens · reward 0.168 · 0:09 elapsed · 3:32 left``."""
        done, elapsed = self.done + self._partly, time.monotonic() - self._begun
        parts = [f"{done:,.0f}/{self.total:,} {self._unit}".rstrip()] if self.total > 1 else []
        parts += [self._note, f"{clock(elapsed)} elapsed"]
        if (left := self._own_left()) is not None:
            parts.append(f"{clock(left)} left")
        return " · ".join(filter(None, parts))

    def __rich__(self) -> RenderableType:
        """Two lines for a terminal."""
        head, bar, left = self.label, self.share, ""
        if self._plan is not None:
            head, bar = f"{self._plan.head()}  {self.label}", self._plan.share(self.share)
            left = self._left()
        line = Table.grid(padding=(0, 2))
        line.add_row(Text(head), ProgressBar(1.0, bar, width=24), Text(left))
        return Group(line, Text(self.status(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _own_left(self) -> float | None:
        """Seconds until the stage ends; ``None`` while nothing says how fast it is."""
        done, elapsed = self.done + self._partly, time.monotonic() - self._begun - self._waited
        return elapsed / (done - self._known) * (self.total - done) if done > self._known else None

    def _left(self) -> str:
        if self._plan is None or self._is_waiting:
            return ""
        left, own = self._plan.left(self.share), self._own_left()
        # A stage that the plan took for short may last longer than the plan says all will.
        return f"{clock(max(left, own or 0.0))} left in all"

    def _print_line(self) -> None:
        if self._console.is_terminal or time.monotonic() - self._last <= SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        whole = "" if self._plan is None else f"{self._plan.head()}: "
        line = " · ".join(filter(None, [f"{whole}{self.label}: {self.status()}", self._left()]))
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def clock(seconds: float) -> str:
    """``"0:09"``, ``"12:40"``, ``"3:05:00"`` or ``"1.6 days"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{seconds / 86400:,.1f} days"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Where a job says what it is doing.

    Args:
        console: live lines are drawn only where it is a terminal; stderr where none is given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._plan: _Plan | None = None

    def plan(self, steps: Sequence[Step]) -> None:
        """Say which steps the job has from here on; its stages show how far it is, and how long it takes in all."""
        self._plan = _Plan(steps)

    @contextmanager
    def stage(self, label: str, total: int, unit: str = "") -> Iterator[StageProgress]:
        """Show one stage until the block ends, then a line with its duration."""
        begun = time.monotonic()
        plan = self._plan if self._plan is not None and self._plan.enter(label) else None
        stage = StageProgress(label, total, unit, self.console, plan)
        if self.console.is_terminal:
            with Live(stage, console=self.console, transient=True):
                yield stage
        else:
            yield stage
        start = f", {clock(stage.start_seconds)} of it to start" if stage.start_seconds >= 1 else ""
        self.print(f"{label}: done in {clock(time.monotonic() - begun)}{start}")

    def print(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
