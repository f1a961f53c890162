"""EvoPress: one parent, level-switch mutations, several rounds of selection (Sieberling et al. 2024, arXiv 2410.14649).

The problem: maximise R over allocations of equal cost. A child is its parent with a few units moved: one sublayer gets
more, another the same less. EvoPress measures many children on few tokens, the best of them again on more tokens, and
lets the last survivor replace the parent if it is better.

How that maps to a vector environment, whose every step measures all its episodes on one subset:

* A round of selection is a vector step. Who survives one is measured again in the next, on the next subset, and is
  judged by the mean over all its steps: token counts grow by adding subsets. Those tokens count.
* The parent is measured in every step. Only differences from it in the same steps are compared, never rewards of
  different subsets. The last round's winner must beat it on all the winner's tokens (the elitism of the paper).
* A step has a fixed number of episodes, so the rounds overlap: what parent and survivors leave free goes to new
  children. No episode measures the same twice, and after the first steps every step ends a generation.
* Units move through importances: one up, one down by the same step. Between two sublayers of one kind that keeps the
  cost as it is; between attention and MLP, and at the edges of [-1, 1], the projection evens out the rest over all.
* The paper's code never measures a child that it has seen. Allocations are not the agent's to see, so a switch too
  small to move a unit is measured like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffgym.plugins.bases import BatchAgent

STEP = 0.2  # how far a level switch moves, in importance units (2 spans all keep ratios)
MOST_SWITCHES = 3  # of a child; the number is the smaller of two uniform draws, as in the paper
SURVIVORS = (2, 1)  # of each round; the last round's one replaces the parent if it is better


class EvoPress(BatchAgent):
    """(1 + lambda) evolution by level switches with successive halving."""

    name = "evopress"
    least_episodes = 2 + sum(SURVIVORS[:-1])  # parent, survivors, a child
    _actions: np.ndarray | None = None  # parent, then survivors, shape (1 + survivors, 2L)

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior (or 0), or from the parent of a state that was loaded."""
        prior = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean
        parent = prior if self._actions is None else self._actions[0]
        self._actions = parent[None].astype(np.float32)
        self._rewards: list[list[float]] = [[]]  # of each of them, over its latest steps
        self._batch = batch
        self._rng = np.random.default_rng(seed)

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Parent, survivors, new children, shape (batch, 2L), float32."""
        assert self._actions is not None, "begin comes first"
        children = [self._child(self._actions[0]) for _ in range(self._batch - len(self._actions))]
        return np.stack([*self._actions, *children]).astype(np.float32)

    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Select in every round; replace the parent where the last round's winner is better."""
        seen = self._rewards + [[] for _ in range(self._batch - len(self._rewards))]
        seen = [[*past, float(reward)] for past, reward in zip(seen, rewards, strict=True)]
        rounds = len(SURVIVORS)
        best = self._best(seen, age=rounds, parent=0, count=1)
        replaced = bool(best) and _gain(seen, best[0], parent=0) > 0
        parent = best[0] if replaced else 0
        chosen = [parent]
        for age, count in enumerate(SURVIVORS[:-1], start=1):
            chosen += self._best(seen, age=age, parent=parent, count=count)
        self._actions, self._rewards = actions[chosen], [seen[i][-rounds:] for i in chosen]
        return {"population/replaced": float(replaced)}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The parent."""
        return [] if self._actions is None else [self._actions[0]]

    def state(self) -> dict[str, Any]:
        """The parent."""
        return {} if self._actions is None else {"parent": self._actions[0].tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a parent."""
        self._actions = np.array([state["parent"]], dtype=np.float32)

    def _best(self, seen: list[list[float]], *, age: int, parent: int, count: int) -> list[int]:
        """The best of those that were measured ``age`` times, neither the old parent nor the new."""
        peers = [i for i in range(1, len(seen)) if len(seen[i]) == age and i != parent]
        return sorted(peers, key=lambda i: _gain(seen, i, parent), reverse=True)[:count]

    def _child(self, parent: np.ndarray) -> np.ndarray:
        child = parent.astype(np.float64)
        for _ in range(int(self._rng.integers(1, MOST_SWITCHES + 1, size=2).min())):
            # What is at an edge of [-1, 1] cannot move further; what it does not take, the projection spreads over all.
            less = self._rng.choice(_or_all(child > -1))
            others = np.delete(np.arange(len(child)), less)
            more = others[self._rng.choice(_or_all(child[others] < 1))]
            child[more] += STEP
            child[less] -= STEP
            child = np.clip(child, -1.0, 1.0)
        return child


def _or_all(wanted: np.ndarray) -> np.ndarray:
    """Indices of what is wanted; all of them where nothing is."""
    return np.flatnonzero(wanted) if wanted.any() else np.arange(len(wanted))


def _gain(seen: list[list[float]], index: int, parent: int) -> float:
    """Mean difference from the parent over all of its steps, in which the parent was measured too."""
    steps = len(seen[index])
    return float(np.mean(seen[index]) - np.mean(seen[parent][-steps:]))
