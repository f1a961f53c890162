"""The vector environment that agents see: one vector step is one update, all on the same task.

It owns the schedule, redraws the token subset once an update (common random numbers within it), counts tokens, and
keeps the history. Every episode ends after its step and the next one begins at once (SAME_STEP autoreset). Where
actions of one update come to the same allocation, it is measured once and counts for each: the bits would be the same.

Under a range of budgets every update has a target of its own, drawn evenly over the range from the seed. One target an
update, not several: the advantage is taken among episodes of equal target, and it is the better the more there are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ffgym.envs.pruning_env import OBJECTIVE, PruningEnv
from ffgym.envs.schedule import Schedule, Stage, stratified
from ffgym.errors import DataError
from ffgym.plugins.contracts import check_actions
from ffgym.types import Episode

Infos = dict[str, Any]
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Infos]
FINAL_INFO = ("kept", "reward", "loss", "dense_loss", "sparsity", "tokens", "failed", "stopped_early")


class PruningVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` episodes an update, measured one after another on one model.

    Args:
        env: the stationary task.
        schedule: sparsity and fidelity over the token budget.
        num_envs: episodes per update.
        token_budget: tokens that the search may evaluate; the update that crosses it is the last.
        stop_margin: an episode is hopeless, and cut short, when its loss above dense is this many standard deviations
            above the mean of the last update at the same target and fidelity; ``None`` cuts none short.
        on_episode: called after every episode.
        slope_episodes: of how many episodes of every update, the first ones, slopes are measured too; ``final_info``
            then holds ``slopes``, shape (num_envs, 2L), 0 for the others.
        replay: episodes of an earlier, interrupted search with the same seed: they are taken as they are instead of
            being measured again.

    Attributes:
        history: every episode so far, also those of an update that was interrupted.
        tokens_spent: tokens evaluated so far.
    """

    def __init__(
        self,
        env: PruningEnv,
        schedule: Schedule,
        *,
        num_envs: int,
        token_budget: int,
        stop_margin: float | None = None,
        slope_episodes: int = 0,
        on_episode: Callable[[Episode], None] | None = None,
        replay: Sequence[Episode] = (),
        log_name: str = "the log",
    ) -> None:
        self.env = env
        self.schedule = schedule
        self.num_envs = num_envs
        self.token_budget = token_budget
        self.stop_margin = stop_margin
        self.slope_episodes = slope_episodes
        self.history: list[Episode] = []
        self.tokens_spent = 0
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.single_action_space = env.action_space
        self.single_observation_space = env.observation_space
        self.action_space = batch_space(env.action_space, num_envs)
        self.observation_space = batch_space(env.observation_space, num_envs)
        self._on_episode = on_episode
        self._replay = replay
        self._log_name = log_name
        self._update = 0
        self._first_place = 1.0
        self._stage = schedule.stage(0.0)
        self._subset: tuple[int, ...] = ()
        self._examples: tuple[int, ...] = ()
        self._hopeless: float | None = None

    @property
    def tokens_left(self) -> int:
        """Tokens that the search may still evaluate."""
        return max(0, self.token_budget - self.tokens_spent)

    @property
    def stage(self) -> Stage:
        """What the running update is measured at."""
        return self._stage

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, Infos]:
        """Begin an update: draw its subset. The seed fixes every subset that follows, and every target of a range.

        Of a list of seeds the first one counts: all actions of an update are measured on one subset.
        """
        first = seed if seed is None or isinstance(seed, SupportsIndex) else seed[0]
        super().reset(seed=None if first is None else operator.index(first))
        if self.schedule.low is not None:
            self._first_place = float(self.np_random.random())
        return self._begin(), {}

    def step(self, actions: np.ndarray) -> Step:
        """Measure one update and begin the next.

        Raises:
            ValueError: actions of another shape, not finite, or outside [-1, 1].
            RuntimeError: before ``reset``, or when no tokens are left.
        """
        if not self._subset:
            raise RuntimeError("step before reset: call env.reset(seed=seed) first")
        if self.tokens_left == 0:
            raise RuntimeError(
                f"step after all {self.token_budget:,} tokens were spent: stop when env.tokens_left is 0"
            )
        actions = check_actions(actions, (self.num_envs, len(self.env.budget.sublayers)))
        return self.measure(actions)

    def measure(self, actions: np.ndarray) -> Step:
        """Do what :meth:`step` does once it has checked: what is raised here is not the agent's doing."""
        last = np.tile(self.env.observation(), (self.num_envs, 1))
        episodes = [self._episode(action, slopes=i < self.slope_episodes) for i, action in enumerate(actions)]
        self._update += 1
        following = self._begin()
        done = np.ones(self.num_envs, dtype=bool)
        infos: Infos = {
            "final_obs": last,
            "final_info": {name: np.array([getattr(e, name) for e in episodes]) for name in FINAL_INFO},
            "_final_obs": done,
            "_final_info": done,
        }
        if self.slope_episodes:
            none = (0.0,) * actions.shape[1]
            infos["final_info"]["slopes"] = np.array([episode.slopes or none for episode in episodes])
        rewards = np.array([episode.reward for episode in episodes])
        return following, rewards, done, np.zeros(self.num_envs, dtype=bool), infos

    def _begin(self) -> np.ndarray:
        place = stratified(self._first_place, self._update)
        self._stage = self.schedule.stage(self.tokens_spent / self.token_budget, place)
        self._subset = self.env.draw(self.np_random, self._stage.windows)
        self._examples = self.env.draw_examples(self.np_random, self._stage.windows)
        self._hopeless = self._threshold()
        observation, _ = self.env.reset(options=self._task())
        return np.tile(observation, (self.num_envs, 1))

    def _task(self) -> dict[str, Any]:
        """What all episodes of the running update are told."""
        return {
            "sparsity": self._stage.sparsity,
            "subset": self._subset,
            "examples": self._examples,
            "hopeless": self._hopeless,
        }

    def _threshold(self) -> float | None:
        """Loss above dense (nats per token) from which on an episode of this update is hopeless.

        Fixed before the update begins, so that within it the same action earns the same reward.
        """
        stage = (self._stage.sparsity, self._stage.fidelity)
        last = [e for e in self.history[-self.num_envs :] if (e.target_sparsity, e.fidelity) == stage and not e.failed]
        if self.stop_margin is None or len(last) < 2:
            return None
        above = np.array([episode.loss - episode.dense_loss for episode in last])
        return float(above.mean() + self.stop_margin * above.std())

    def _episode(self, action: np.ndarray, *, slopes: bool) -> Episode:
        index = len(self.history)
        if index < len(self._replay):
            episode = self._replayed(index, action, slopes=slopes)
        elif not slopes and (twin := self._twin(action)):
            tokens = twin.tokens - twin.slope_tokens
            episode = replace(twin, index=index, action=action, tokens=tokens, slopes=(), slope_tokens=0)
        else:
            episode = self._measured(index, action, slopes=slopes)
        self.tokens_spent += episode.tokens
        self.history.append(episode)
        if self._on_episode is not None:
            self._on_episode(episode)
        return episode

    def _replayed(self, index: int, action: np.ndarray, *, slopes: bool) -> Episode:
        episode = self._replay[index]
        stage, kept = self._stage, self.env.budget.project(action, self._stage.sparsity).kept
        task = (episode.update, episode.target_sparsity, episode.fidelity, episode.kept, bool(episode.slopes))
        if task != (self._update, stage.sparsity, stage.fidelity, kept, slopes) or not np.array_equal(
            episode.action, action
        ):
            raise DataError(
                f"episode {index} of {self._log_name} is not what this search does: it was written with another "
                "configuration, starting policy, seed, version or thread count, or the agent does not follow its seed",
                hint=f"Delete {self._log_name} to search from the start.",
            )
        return episode

    def _twin(self, action: np.ndarray) -> Episode | None:
        """The episode of this update that was measured on the same allocation, if there is one."""
        kept = self.env.budget.project(action, self._stage.sparsity).kept
        siblings = itertools.takewhile(lambda episode: episode.update == self._update, reversed(self.history))
        return next((episode for episode in siblings if episode.kept == kept), None)

    def _measured(self, index: int, action: np.ndarray, *, slopes: bool) -> Episode:
        self.env.reset(options={**self._task(), "slopes": slopes})
        _, reward, _, _, info = self.env.step(action)
        return Episode(
            index=index,
            update=self._update,
            action=action,
            kept=tuple(int(k) for k in info["kept"]),
            reward=reward,
            loss=float(info["loss"]),
            dense_loss=float(info["dense_loss"]),
            target_sparsity=self._stage.sparsity,
            sparsity=float(info["sparsity"]),
            fidelity=self._stage.fidelity,
            tokens=int(info["tokens"]),
            failed=bool(info["failed"]),
            objectives={
                key.removeprefix(OBJECTIVE): float(value) for key, value in info.items() if key.startswith(OBJECTIVE)
            },
            stopped_early=bool(info["stopped_early"]),
            slopes=tuple(float(x) for x in info.get("slopes", ())),
            slope_tokens=int(info.get("slope_tokens", 0)),
        )
