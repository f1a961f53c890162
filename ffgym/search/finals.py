"""The finals: what a search hands over is chosen on windows of the search split that no reward has seen.

The policy's recommendation is the default: it has learnt from all tokens, and a single episode has been lucky on few.
Where an agent recommends several allocations, the best of the first three on all the windows is the default.
The windows are cut in two. On the first half the other candidates are thinned out by successive halving (Karnin et al.
2013), on the second half the one that is left meets the default, and replaces it only where it is better by more than
``SIGNIFICANT`` standard errors of the paired difference. What the search started from meets it too, so that no search
ends behind that by more than the finals can tell. Under a range of budgets that is done for every point of the front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from ffgym.envs.pruning_env import Outcome, PruningEnv, Trial
from ffgym.report.paired import standard_error
from ffgym.search.finalists import STARTS, Candidate
from ffgym.types import OnShare, do_nothing

FINALS_SEED = 7_919  # the same windows for every agent of one seed
SIGNIFICANT = 2.0  # paired standard errors
RECOMMENDED = 3  # the default is the best of so many recommendations, the first ones


def run_finals(
    env: PruningEnv, candidates: Sequence[Candidate], seed: int, on_progress: OnShare = do_nothing
) -> tuple[list[Candidate], float | None, int]:
    """Choose among candidates; the chosen one first, with the dense loss on the last windows and the tokens taken.

    A single candidate is chosen without being measured, and so is the first one where no windows are reserved. Where
    all layers share one shape, or there is one window, all candidates are measured on all windows: there are few. Where
    there is but one other candidate, which nothing has chosen, all windows decide.

    Args:
        env: measures and judges; half of what it reserves thins out, the other half decides.
        candidates: the agent's recommendations first, the best of the first three of which is the default; those
            of an origin in `STARTS` are not thinned out. Without a recommendation, what is left of them is the default.
        seed: of the windows' order.
        on_progress: called with the share that is measured, from 0 to 1.
    """
    if len(candidates) == 1 or not env.reserved:
        return list(candidates), None, 0
    windows, examples = finals_windows(env, seed), finals_examples(env, seed)
    count = len(windows)
    all_count = env.budget.tied or count == 1
    own = env.tokens(windows, examples)
    starts = sum(candidate.origin in STARTS for candidate in candidates)
    recommended = [i for i, candidate in enumerate(candidates[:RECOMMENDED]) if candidate.origin == "policy"]
    expected = expected_tokens(len(candidates) - starts, own, len(recommended), count)
    total = len(candidates) * own if all_count else expected

    def on_tokens(taken: float) -> None:
        on_progress(min(1.0, taken / total))

    measured = _Measured(env, candidates, windows, examples, on_tokens)
    everywhere, thinning, deciding = range(count), range(max(1, count // 2)), range(count // 2, count)
    everyone = range(len(candidates))
    if len(recommended) > 1:
        measured.add(recommended, everywhere)
        recommended.sort(key=lambda i: measured.standing(i, everywhere), reverse=True)
    default = recommended[:1]
    start = [i for i in everyone if candidates[i].origin in STARTS]
    others = [i for i in everyone if i not in (*recommended, *start)]
    if all_count:
        measured.add(everyone, everywhere)
        deciding = deciding if len(others) > 1 else everywhere  # half of them choose, where there is a choice
    seated = [*default, *_thinned_out(measured, others, thinning), *start]
    measured.add(seated, deciding)
    chosen = seated[0]
    for rival in seated[1:]:
        if _is_better(measured.rewards(rival, deciding) - measured.rewards(chosen, deciding)):
            chosen = rival
    on_tokens(total)
    shown = everywhere if all_count else deciding
    order = sorted(everyone, key=lambda i: (i == chosen, *measured.standing(i, shown)), reverse=True)
    return [measured.known(i, shown) for i in order], measured.dense_loss(chosen, shown), measured.tokens


def expected_tokens(finalists: int, tokens: int, recommended: int, windows: int) -> int:
    """About what the finals of a search take.

    Args:
        finalists: candidates beside what the search started from.
        tokens: reserved for the finals: the tokens of all their windows.
        recommended: how many of the finalists the agent recommends; the first three are measured on all windows.
        windows: that are reserved, of the same number of tokens each.
    """
    if windows < 2:
        return (finalists + 1) * tokens
    recommended = min(recommended, RECOMMENDED, finalists)
    others, thinning, deciding = finalists - recommended, windows // 2, windows - windows // 2
    count = deciding * ((recommended == 1) + (others > 0) + 1) + (recommended > 1) * recommended * windows
    count += sum(left * len(places) for left, places in _rounds(others, range(thinning)))
    return count * tokens // windows


def _thinned_out(measured: _Measured, candidates: Sequence[int], places: range) -> list[int]:
    """The best of some candidates: part of them goes after every round, and rounds double in length."""
    left = list(candidates)
    for count, new in _rounds(len(candidates), places):
        left = left[:count]
        measured.add(left, new)
        left.sort(key=lambda i: measured.standing(i, places[: new.stop]), reverse=True)
    return left[:1]


def _rounds(count: int, places: range) -> Iterator[tuple[int, range]]:
    """How many of some candidates are left in each round, and the places that it adds; none for a single one."""
    rounds = min(math.ceil(math.log2(max(1, count))), math.floor(math.log2(len(places) + 1)))
    for number in range(rounds):
        begin, end = ((2**n - 1) * len(places) // (2**rounds - 1) for n in (number, number + 1))
        yield math.ceil(float(count) ** (1 - number / rounds) - 1e-9), places[begin:end]


def _is_better(differences: np.ndarray) -> bool:
    """Whether paired differences are above 0 by more than ``SIGNIFICANT`` of their standard errors."""
    error = standard_error(differences)
    return error is not None and float(differences.mean()) > SIGNIFICANT * error


@dataclass
class _Measured:
    """Results of candidates on single windows of the finals, each measured once."""

    env: PruningEnv
    candidates: Sequence[Candidate]
    windows: Sequence[int]
    examples: Sequence[int]  # task examples, which are dealt out to the windows
    on_tokens: Callable[[float], None]  # called with the tokens taken so far
    tokens: int = 0
    outcomes: dict[tuple[int, int], Outcome] = field(default_factory=dict)  # by candidate and place of a window

    def add(self, indices: Iterable[int], places: Iterable[int]) -> None:
        """Measure candidates on windows."""
        new = [key for key in product(indices, places) if key not in self.outcomes]
        trials = [Trial(self.candidates[i].allocation, (self.windows[place],), self._dealt(place)) for i, place in new]
        before, own = self.tokens, sum(self.env.tokens(trial.subset, trial.examples) for trial in trials)
        outcomes = self.env.outcomes(trials, lambda share: self.on_tokens(before + share * own))
        for key, outcome in zip(new, outcomes, strict=True):
            self.outcomes[key] = outcome
            self.tokens += outcome.tokens

    def rewards(self, index: int, places: Iterable[int]) -> np.ndarray:
        """Of a candidate on windows, shape (windows,)."""
        return np.array([self.outcomes[index, place].reward for place in places])

    def standing(self, index: int, places: Sequence[int]) -> tuple[float, float]:
        """To sort by: mean reward, then loss, where rewards have become too small to differ."""
        if not self._has(index, places):
            return -math.inf, -math.inf
        loss = self._loss(index, places)
        return float(self.rewards(index, places).mean()), -loss if math.isfinite(loss) else -math.inf

    def _dealt(self, place: int) -> tuple[int, ...]:
        """Examples that go with a window; where there are fewer than windows, they go round."""
        windows, count = len(self.windows), len(self.examples)
        return tuple(self.examples[i % count] for i in range(place, max(windows, count), windows)) if count else ()

    def known(self, index: int, places: Sequence[int]) -> Candidate:
        """A candidate with its results on windows; as it was where it was not measured on them."""
        candidate = self.candidates[index]
        if not self._has(index, places):
            return candidate
        judged = [self.outcomes[index, place] for place in places]
        names = judged[0].objectives if all(j.objectives for j in judged) else {}
        return replace(
            candidate,
            loss=self._loss(index, places),
            reward=float(np.mean([j.reward for j in judged])),
            objectives={name: float(np.mean([j.objectives[name] for j in judged])) for name in names},
        )

    def dense_loss(self, index: int, places: Sequence[int]) -> float:
        """Of the dense model on windows that a candidate was measured on."""
        return float(np.mean([self.outcomes[index, place].dense.loss for place in places]))

    def _has(self, index: int, places: Sequence[int]) -> bool:
        return all((index, place) in self.outcomes for place in places)

    def _loss(self, index: int, places: Sequence[int]) -> float:
        return float(np.mean([self.outcomes[index, place].pruned.loss for place in places]))


def finals_windows(env: PruningEnv, seed: int) -> tuple[int, ...]:
    """Indices of the search windows that finalists, and later final refits, are compared on: the reserve, shuffled."""
    reserve = np.arange(len(env.windows) - env.reserved, len(env.windows))
    return tuple(np.random.default_rng([FINALS_SEED, seed]).permutation(reserve).tolist())


def finals_examples(env: PruningEnv, seed: int) -> tuple[int, ...]:
    """Indices of the task examples that finalists are compared on: as many to a window as an episode has."""
    return env.draw_examples(np.random.default_rng([FINALS_SEED, seed, 1]), env.reserved, finals=True)
