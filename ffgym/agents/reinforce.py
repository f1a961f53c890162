"""One-step REINFORCE over importances: our own, and what ffgym exists for (arXiv 2511.18977; docs/mathematics.md).

The problem: maximise J = E_{a ~ N(mu(p), s^2 C)}[R(a)] over mu, where an episode is one action a (2L importances) and
one reward, p is the target sparsity, and C says how noise is shared over depth. No discount, no bootstrapping.

With a = mu + s S z, z ~ N(0, I), C = S S, the score-function gradient with respect to mu, taken in the Gaussian's own
metric (natural gradient), is E[A (a - mu)]: no inverse, no Adam, steps in units of the policy's spread. Episodes come
in antithetic pairs mu +- s S z, which cancel what is even in the noise. Every pair has text of its own. Its advantage A
is half the difference of its rewards over the root mean square of the update's, clipped. A sublayer of which both
episodes of a pair kept the same earns nothing: the noise on it changed nothing.

A gradient has two parts, as in a stochastic computation graph. Where the reward has a derivative, the pathwise one is
far less noisy. So all tokens follow slopes, one episode an update, as `pathwise` does. A sublayer whose units are too
coarse for a derivative, such as an attention of three KV groups, keeps or loses its last unit as a coin says, and the
slopes with and without it tell (`ffgym.agents.coarse`); over a range of budgets it is left alone. A reward that weighs
several things has no slopes that lead where it rises: all tokens explore.

Over a range of budgets mu is a line in p (`ffgym.agents.line`). It starts from the prior's allocations at the two
ends; every update is measured at one p and moves the line so that mu(p) makes the whole step.

Sources: REINFORCE, Williams 1992; score-function and pathwise gradients in one graph, Schulman et al. 2015 (arXiv
1506.05254); natural gradients, Amari 1998, and for Gaussian search distributions natural evolution strategies (Wierstra
et al. 2014, arXiv 1106.4487); antithetic pairs, Salimans et al. 2017 (arXiv 1703.03864); averaging, Polyak and Juditsky
1992.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ffgym.agents.averaging import tail_mean
from ffgym.agents.coarse import SampledUnits, projection_shift
from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.agents.line import AT_ALL, line_at, line_from, line_through, shares_of_step
from ffgym.agents.pathwise import SlopeDescent
from ffgym.plugins.bases import SLOPE_PASSES, BatchAgent, OnUpdate, PluginConfig

GREATEST_ADVANTAGE = 2.0
TRIED_FROM = (0.2, 0.6)  # shares of the tokens after which units begin to be tried, each time others
EXPLORING = "used only where all tokens explore: slopes = false, or a reward or environment without slopes"


class ReinforceConfig(PluginConfig):
    """Options of the agent."""

    slopes: bool = Field(
        True,
        description="follow slopes, if there are any and they lead where the reward rises; else all tokens explore",
    )
    learning_rate: float = Field(
        1.0, gt=0, description=f"step of the mean, in units of the policy's spread times the advantage; {EXPLORING}"
    )
    spread: float = Field(
        0.15,
        gt=0,
        description="standard deviation of the exploration, in importance units (2 spans all keep ratios); "
        + EXPLORING,
    )
    smooth: float = Field(
        0.95,
        ge=0,
        le=1,
        description="share of the exploration's variance that is shared by neighbouring layers of one kind; "
        + EXPLORING,
    )
    average: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the last updates whose means are averaged into the recommended policy; 0 takes the last",
    )


class Reinforce(BatchAgent):
    """Policy gradient over a Gaussian of importances whose mean is a function of the target sparsity."""

    name = "reinforce"
    Config: ClassVar[type[PluginConfig]] = ReinforceConfig
    edition = 3
    least_episodes = 2
    pair_text = True
    budget_conditioned: ClassVar[bool] = True
    recommendations: ClassVar[int] = 3  # where units were tried

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._line: np.ndarray | None = None  # weights of the mean, shape (2, 2L)
        self._lines: list[np.ndarray] = []
        self._measured_at: float | None = None  # the sparsity of the last update
        self._follows = False
        self._choose_at: tuple[float, ...] = ()
        self._trial: SampledUnits | None = None

    @property
    def asks_slopes(self) -> bool:
        """Unless all tokens explore."""
        return bool(self.config.slopes)

    def update_cost(self, episodes_per_update: int) -> int:
        """Of its two kinds of update the dearer one."""
        return max(episodes_per_update, 1 + SLOPE_PASSES) if self.asks_slopes else episodes_per_update

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Follow slopes where the environment has them and they lead where the reward rises, else explore."""
        task = env.unwrapped
        self._follows = self.asks_slopes and getattr(task, "has_slopes", False) and getattr(task, "slopes_lead", True)
        coarse = getattr(task, "coarse", None)
        has_trials = self._follows and self.budgets is None and coarse is not None and coarse.any()
        self._choose_at = TRIED_FROM if has_trials else ()
        super().learn(env, seed=seed, on_update=on_update)

    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Start from the prior (or zeros), unless a policy has been loaded."""
        if self._line is None:
            self._line = self._prior(dimensions)
        self._start_slope = self._line[1]
        self._measured_at = None
        self._lines = []
        self._trial = None
        self._coarse = np.zeros(dimensions, bool) if self.coarse is None else self.coarse
        self._was_tried = np.zeros(dimensions, bool)
        self.slope_episodes = int(self._follows)
        self._shifts: list[np.ndarray] = []
        self._rise = np.zeros(())  # what the projection adds to the mean, kept apart from where units are tried on
        self._rises: list[np.ndarray] = []
        self._slopes: list[np.ndarray] = []
        self._batch = batch
        self._rng = np.random.default_rng(seed)
        self._descent = SlopeDescent(dimensions, self.coarse)
        self._root = self.config.spread * square_root(depth_covariance(dimensions, smooth=self.config.smooth))

    def ask(self, observations: np.ndarray) -> np.ndarray:
        """The mean alone where slopes are followed, with or without each unit that is tried; else mirrored pairs.

        float32, clipped to [-1, 1].
        """
        if self._slopes and self._choose_at and self.progress >= self._choose_at[0]:
            self._choose_at = self._choose_at[1:]
            self._choose_units()
        mean = self._mean(float(observations[0][0]))
        if self._follows:
            actions = (mean if self._trial is None else self._trial.draw(mean + self._rise, self._rng))[None]
        else:
            pairs = (self._batch + 1) // 2
            self._noise = self._rng.standard_normal((pairs, len(mean))) @ self._root
            actions = mean + np.concatenate([self._noise, -self._noise])[: self._batch]
        return np.asarray(np.clip(actions, -1.0, 1.0), dtype=np.float32)

    def take_slopes(self, slopes: np.ndarray) -> None:
        """Keep the slope for the step that follows."""
        (self._slope,) = slopes
        self._slopes.append(self._slope)

    def tell(
        self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, kept: np.ndarray | None = None
    ) -> dict[str, float]:
        """One step of the mean: down the slope, or along the natural gradient."""
        sparsity = float(observations[-1][0])
        if self._follows:
            step = -self._descent.step(self._slope)
            if kept is not None and self.units is not None:
                self._shifts.append(projection_shift(actions[0], kept[0], self.units))
                if self._trial is not None:
                    self._trial.add(self._slope, kept[0])
                    self._rise = self._rise + 2 * self._shifts[-1]
                    self._rises.append(self._rise)
        else:
            step = self._natural_gradient(rewards, kept)
        self._measured_at = sparsity
        self._move(step, sparsity)
        return {"policy/mean": float(self._mean(sparsity).mean()), "policy/step": float(np.linalg.norm(step))}

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The policy's mean, averaged over the last updates.

        Where units were tried: without all that the evidence is against, without those that it is clearer against, and
        as it was before any was tried.
        """
        if self._line is None:
            return []
        lines = [self._settled()]
        if self._trial is not None:
            clearer = self._trial.settled(self._risen(), errors=1.0)
            lines += [np.outer(AT_ALL, each) for each in (clearer, self._whole)]
        means = (line_at(line, float(observation[0])) for line in lines)
        return [np.clip(mean, -1.0, 1.0).astype(np.float32) for mean in means]

    def state(self) -> dict[str, Any]:
        """Mean of the policy (averaged as recommended, so that a run that starts from it starts well).

        A search at one sparsity learns nothing of the slope: all sparsities get what was learnt there.
        """
        if self._line is None:
            return {}
        line = self._settled()
        if self.budgets is None and self._measured_at is not None:
            line = line_from(self._measured_at, line_at(line, self._measured_at), self._start_slope)
        return {"weights": line.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start from the mean of a policy that ``state`` returned."""
        self._line = np.array(state["weights"], dtype=np.float64)

    def _choose_units(self) -> None:
        """Go on from where the slopes led, on average, and try units of coarse sublayers that were not tried yet."""
        assert self.units is not None, "the environment says which are coarse by it"
        if self._trial is None:
            self._rise = 2 * tail_mean(self._shifts, self.config.average)
            self._whole = self._risen()
            self._levels = np.rint((self._whole + 1) / 2 * self.units)
        else:
            self._levels = self._levels - self._trial.gone()
        may_go = self._coarse & ~self._was_tried & (self._slope != 0)  # 0 where the budget holds the last unit by now
        self._trial = SampledUnits(self._coarse, self._levels, self.units, may_go, np.array(self._slopes))
        self._was_tried |= self._trial.tried
        self._line, self._lines, self._rises = np.outer(AT_ALL, self._averaged()), [], []

    def _natural_gradient(self, rewards: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
        """The natural gradient, estimated from the pairs of an update, shape (2L,)."""
        advantages = pair_advantages(rewards)
        pairs = len(advantages)
        noise = self._noise[:pairs]
        moved = np.ones(noise.shape) if kept is None else kept[:pairs] != kept[-pairs:]
        return np.asarray(self.config.learning_rate * (advantages[:, None] * moved * noise).mean(axis=0))

    def _move(self, step: np.ndarray, sparsity: float) -> None:
        """Let the mean at a sparsity make a step, and come back to the edge where that leaves [-1, 1]."""
        assert self._line is not None, "begin comes first"
        shares = shares_of_step(sparsity, self.budgets)
        self._line = self._line + np.outer(shares, step)
        mean = self._mean(sparsity)
        back = np.clip(mean, -1.0, 1.0) - mean
        self._line = self._line + np.outer(shares if self.budgets is not None else AT_ALL, back)
        self._lines.append(self._line)

    def _settled(self) -> np.ndarray:
        """The line, averaged over the last updates; where units are tried, what the evidence says at every sparsity."""
        assert self._line is not None, "begin comes first"
        if self._trial is not None:
            return np.outer(AT_ALL, self._trial.settled(self._risen()))
        return tail_mean(self._lines, self.config.average) if self._lines else self._line

    def _averaged(self) -> np.ndarray:
        """The mean at the last update's sparsity, averaged over the last updates, shape (2L,)."""
        assert self._line is not None, "begin comes first"
        assert self._measured_at is not None, "slopes were measured"
        return line_at(tail_mean(self._lines or [self._line], self.config.average), self._measured_at)

    def _risen(self) -> np.ndarray:
        """The averaged mean and what the projection adds to it, averaged too; shape (2L,), within [-1, 1]."""
        rise = tail_mean(self._rises or [self._rise], self.config.average)
        return np.asarray(np.clip(self._averaged() + rise, -1.0, 1.0))

    def _prior(self, dimensions: int) -> np.ndarray:
        """The line through the prior at the ends of a range, or the prior at every sparsity."""
        if self.budgets is not None and self.prior_ends is not None:
            return line_through(self.budgets, self.prior_ends)
        start = np.zeros(dimensions) if self.prior_mean is None else self.prior_mean.astype(np.float64)
        return np.stack([start, np.zeros(dimensions)])

    def _mean(self, sparsity: float) -> np.ndarray:
        assert self._line is not None, "begin comes first"
        return line_at(self._line, sparsity)


def pair_advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better the first episode of each mirrored pair was than the second.

    Args:
        rewards: shape (batch,), episodes i and i + n/2 of which are a pair; an odd one out counts for nothing.

    Returns:
        shape (batch // 2,), float64: half differences over their root mean square, within +-2; 0 where none differs.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    pairs = len(rewards) // 2
    halves = (rewards[:pairs] - rewards[len(rewards) - pairs :]) / 2
    scale = float(np.sqrt(np.mean(halves**2)))
    return np.asarray(np.clip(halves / scale, -GREATEST_ADVANTAGE, GREATEST_ADVANTAGE)) if scale else halves
