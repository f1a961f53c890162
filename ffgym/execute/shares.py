"""An update shared out among workers: each takes a share of its requests and measures them in one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain

from ffgym.evaluation.evaluator import Request
from ffgym.evaluation.slopes import mean_slopes
from ffgym.execute.pool import ATTEMPTS, too_often
from ffgym.plugins.bases import SLOPE_PASSES
from ffgym.types import Evaluation

OVERDUE = 1.1  # times the expected duration: after that, idle workers measure the share too
HUNG = 5.0  # times the expected duration: after so long without progress, its worker is replaced
LEAST_PATIENCE, FIRST_PATIENCE = 60.0, 1800.0  # seconds; the second while no duration is known


def cost(request: Request) -> float:
    """What a request costs, in windows of a forward pass; an example counts as an eighth."""
    return len(request.windows) * (1 + SLOPE_PASSES * ("slopes" in request.needs)) + len(request.examples) / 8


def parts(request: Request) -> list[Request]:
    """What of a request several workers can measure: for slopes, each window alone, the examples with the first."""
    if "slopes" not in request.needs:
        return [request]
    first, *others = request.windows
    head = replace(request, windows=(first,))
    return [head, *(replace(request, windows=(window,), examples=()) for window in others)]


def joined(answers: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a request from those of its `parts`: the bits of measuring it at once."""
    if len(answers) == 1:
        return answers[0]
    return replace(
        answers[0],
        losses=tuple(chain.from_iterable(each.losses for each in answers)),
        kls=_chained([each.kls for each in answers]),
        reverse_kls=_chained([each.reverse_kls for each in answers]),
        slopes=mean_slopes([each.slopes for each in answers if each.slopes is not None]),
    )


def _chained(rows: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    known = [row for row in rows if row is not None]
    return tuple(chain.from_iterable(known)) if known else None


@dataclass
class Speeds:
    """What is known about the workers from one update to the next: seconds for each unit of cost."""

    known: dict[int, float] = field(default_factory=dict)

    def note(self, worker: int, seconds: float) -> None:
        """Record one share; all earlier ones together count as much."""
        self.known[worker] = (self.known.get(worker, seconds) + seconds) / 2

    def of(self, worker: int) -> float | None:
        """Of one worker; of a typical one where it is not known."""
        return self.known.get(worker, self.typical)

    @property
    def typical(self) -> float | None:
        """The median of all workers; ``None`` at first."""
        return statistics.median(self.known.values()) if self.known else None


@dataclass
class _Share:
    requests: list[Request]
    begun: float = field(default_factory=time.monotonic)
    is_shared: bool = False  # others measure it too

    @property
    def cost(self) -> float:
        return sum(map(cost, self.requests))


class Shares:
    """The queue of an update.

    A worker that is as fast as the others takes an equal share of what is left. When all is taken, idle workers also
    measure the shares of those that are late, and the first answer counts.

    Args:
        requests: different ones, at least one.
        speeds: what is known about the workers; learns from every share.
    """

    def __init__(self, requests: Sequence[Request], speeds: Speeds) -> None:
        self.total = sum(map(cost, requests))
        self.answers: dict[Request, Evaluation] = {}
        self.taken: dict[int, _Share] = {}
        self._left = list(requests)
        self._served: set[int] = set()  # workers that have had a part of what is offered
        self._speeds = speeds
        self._losses = dict.fromkeys(requests, 0)

    @property
    def is_finished(self) -> bool:
        """Whether every request is answered."""
        return len(self.answers) == len(self._losses)

    def take(self, worker: int, alive: Set[int]) -> list[Request] | None:
        """The next share, see `Queue`."""
        self._left = [request for request in self._left if request not in self.answers]
        if not self._left:
            self._offer_again()
        if not self._left:
            return None
        fair, share = self._fair(worker, alive), [self._left.pop(0)]
        self._served.add(worker)
        while self._left and sum(map(cost, share)) + cost(self._left[0]) / 2 <= fair:
            share.append(self._left.pop(0))
        self.taken[worker] = _Share(share)
        return share

    def done(self, worker: int, answer: Sequence[Evaluation]) -> None:
        """Record the answer to a share."""
        share = self.taken.pop(worker)
        self._speeds.note(worker, (time.monotonic() - share.begun) / share.cost)
        for request, evaluation in zip(share.requests, answer, strict=True):
            self.answers.setdefault(request, evaluation)

    def failed(self, worker: int, error: Exception) -> bool:
        """An update needs all of its answers."""
        return False

    def lost(self, worker: int) -> None:
        """Offer a share again; another process takes the worker's place."""
        share = self.taken.pop(worker)
        self._speeds.known.pop(worker, None)
        missing = [request for request in share.requests if request not in self.answers]
        for request in missing:
            self._losses[request] += 1
        if any(self._losses[request] >= ATTEMPTS for request in missing):
            raise too_often("the same measurement")
        self._left += missing
        self._served = set()

    def note_late(self, share: Callable[[int], float]) -> None:
        """Record how fast those are who measure on though all is answered; ``share`` says how much each has done."""
        for worker, late in self.taken.items():
            if done := share(worker):
                self._speeds.note(worker, (time.monotonic() - late.begun) / (late.cost * done))

    def patience(self, worker: int) -> float | None:
        """Several times what a share should take, see `Queue`."""
        expected = self._expected(self.taken[worker], self._speeds.of(worker))
        return FIRST_PATIENCE if expected is None else max(LEAST_PATIENCE, HUNG * expected)

    def _fair(self, worker: int, alive: Set[int]) -> float:
        """How much of what is left a worker should take, in cost, so that all end at the same time."""
        takers = {worker, *(alive - self._served)}
        pace = {each: 1.0 / (self._speeds.of(each) or 1.0) for each in takers}
        return sum(map(cost, self._left)) * pace[worker] / sum(pace.values())

    def _offer_again(self) -> None:
        now, late = time.monotonic(), set[int]()
        for worker, share in self.taken.items():
            expected = self._expected(share, self._speeds.typical)
            if not share.is_shared and expected is not None and now - share.begun > OVERDUE * expected:
                share.is_shared = True
                late.add(worker)
                self._left += [request for request in share.requests if request not in self.answers]
        if late:
            self._served = late

    def _expected(self, share: _Share, speed: float | None) -> float | None:
        return None if speed is None else share.cost * speed
