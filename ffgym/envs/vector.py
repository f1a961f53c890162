"""The vector environment that agents see: one vector step is one update, all at the same target.

It owns the schedule, redraws the text once an update (common random numbers within it), counts tokens, and keeps the
history. With ``pair_text``, episodes i and i + n/2 of an update share text of their own: a mirrored pair cancels the
level of its text, and the slopes of different texts average out over the pairs. Every episode ends after its step and
the next one begins at once (SAME_STEP autoreset). All episodes of an update are measured in one call. If several lead
to the same allocation on the same text, it is measured once and counts for each, because the bits would be the same.

Under a range of budgets every update has one target, drawn evenly over the range from the seed. It is the same for all
its episodes, because advantages compare episodes of equal target, and more of them compare better.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, SupportsIndex

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ffgym.envs.pruning_env import OBJECTIVE, Outcome, PruningEnv, Trial, real_numbers
from ffgym.envs.schedule import Schedule, stratified
from ffgym.errors import DataError
from ffgym.plugins.contracts import check_actions
from ffgym.types import Episode, do_nothing

Infos = dict[str, Any]
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Infos]
Text = tuple[tuple[int, ...], tuple[int, ...]]  # search windows and task examples, as indices
FINAL_INFO = ("kept", "reward", "loss", "dense_loss", "sparsity", "tokens", "failed")


def first_seed(seed: SupportsIndex | Sequence[SupportsIndex | None] | None) -> int | None:
    """The seed of a reset: of a list the first one counts; raises ``DataError`` where there is none in it."""
    if not isinstance(seed, SupportsIndex | None) and not len(seed):
        raise DataError("seed is an empty list", hint="Give one number, one for each environment, or None.")
    first = seed if seed is None or isinstance(seed, SupportsIndex) else seed[0]
    return None if first is None else operator.index(first)


@dataclass(eq=False, repr=False)
class PruningVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` episodes an update.

    Args:
        schedule: sparsity and fidelity over the token budget, or over episodes.
        num_envs: episodes per update.
        token_budget: tokens that the search may evaluate, 1 or more.
        on_episode: called after every episode, when its update has been measured.
        on_progress: called with the tokens of the running update that have been measured.
        slope_episodes: of how many episodes of an update, the first ones, slopes are measured too; ``final_info`` then
            holds ``slopes``, shape (num_envs, 2L), 0 for the others. It may be changed before any step.
        pair_text: every pair of episodes i and i + n/2 has text of its own.
        replay: episodes of an earlier, interrupted search with the same seed: they are taken as they are instead of
            being measured again.
        log_name: what the refusal of an episode of ``replay`` calls the place that it comes from.

    Attributes:
        history: every episode so far.
        tokens_spent: tokens evaluated so far.
        stage: what the running update is measured at.

    Raises:
        DataError: a token budget below 1.
    """

    env: PruningEnv
    schedule: Schedule
    _: KW_ONLY
    num_envs: int
    token_budget: int
    slope_episodes: int = 0
    pair_text: bool = False
    on_episode: Callable[[Episode], None] = do_nothing
    on_progress: Callable[[float], None] = do_nothing
    replay: Sequence[Episode] = ()
    log_name: str = "the log"

    def __post_init__(self) -> None:
        if self.token_budget < 1:
            raise DataError(f"token_budget is {self.token_budget}: a search needs tokens", hint="Give 1 or more.")
        self.history: list[Episode] = []
        self.tokens_spent = 0
        self.metadata = {**self.env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = self.env.render_mode
        self.single_action_space = self.env.action_space
        self.single_observation_space = self.env.observation_space
        self.action_space = batch_space(self.env.action_space, self.num_envs)
        self.observation_space = batch_space(self.env.observation_space, self.num_envs)
        self._update = 0
        self._first_place, self._first_update = 1.0, 0  # of a range, since the last reset
        self.stage = self.schedule.stage(0.0)
        self._texts: list[Text] = []  # of the running update: one for all its episodes, or one for each pair

    @property
    def tokens_left(self) -> int:
        """Tokens that the search may still evaluate."""
        return max(0, self.token_budget - self.tokens_spent)

    @property
    def has_slopes(self) -> bool:
        """Whether slopes can be asked for; see `Budget.has_slopes`."""
        return self.env.budget.has_slopes

    @property
    def units(self) -> np.ndarray:
        """Units of each sublayer, shape (2L,), int64."""
        return np.array([sublayer.units for sublayer in self.env.budget.sublayers])

    @property
    def coarse(self) -> np.ndarray:
        """Which sublayers have so few units that a slope is but an estimate of what one is worth, shape (2L,), bool."""
        return self.env.budget.coarse

    @property
    def slopes_lead(self) -> bool:
        """Whether the reward rises where slopes fall: it depends on what they are of, and on nothing else."""
        return self.env.reward.falls_with is not None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, Infos]:
        """Begin an update: draw its subset. The seed fixes every subset that follows, and every target of a range.

        Of a list of seeds the first one counts.

        Raises:
            DataError: an empty list of seeds; an option, because the schedule sets the task of every update.
        """
        for option in options or {}:
            raise DataError(
                f"a vector environment has no reset options, and was given {str(option)!r}: its schedule sets the task",
                hint="Set prune.sparsity, or use a single environment, which takes options with every reset.",
            )
        with self.env.one_thread:
            super().reset(seed=first_seed(seed))
            if self.schedule.low is not None:
                self._first_place, self._first_update = float(self.np_random.random()), self._update
            return self._begin(), {}

    def step(self, actions: np.ndarray) -> Step:
        """Measure one update and begin the next.

        Args:
            actions: shape (num_envs, 2L), or fewer rows for a smaller update.

        Raises:
            DataError: actions of anything but real numbers.
            ValueError: actions of another shape, not finite, or outside [-1, 1].
            ResetNeeded: before ``reset``.
        """
        if not self._texts:
            raise ResetNeeded("Cannot call env.step() before calling env.reset()")
        shape = (self.num_envs, len(self.env.budget.sublayers))
        with self.env.one_thread:
            return self.measure(check_actions(real_numbers(actions), shape))

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw what every episode of the last update kept; see `PruningEnv.render`."""
        if self.render_mode != "rgb_array":
            return None
        if not self.history:
            return (self.env.picture(self.env.budget.allocation(self.env.prunable.dense_units)),) * self.num_envs
        last = [episode for episode in self.history if episode.update == self.history[-1].update]
        return tuple(self.env.picture(self.env.budget.allocation(e.kept), e.reward) for e in last)

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, where there are some."""
        self.env.close()

    def measure(self, actions: np.ndarray) -> Step:
        """Do what `step` does after its checks; the agent is not to blame for what is raised here."""
        count = len(actions)
        last = np.tile(self.env.observation(), (count, 1))
        episodes = self._episodes(actions)
        self._update += 1
        following = self._begin()
        done = np.ones(count, dtype=bool)
        infos: Infos = {
            "final_obs": last,
            "final_info": {name: np.array([getattr(e, name) for e in episodes]) for name in FINAL_INFO},
            "_final_obs": done,
            "_final_info": done,
        }
        for name in next((episode.objectives for episode in episodes if episode.objectives), ()):
            values = [episode.objectives.get(name, math.nan) for episode in episodes]  # a failed one has none
            infos["final_info"][OBJECTIVE + name] = np.array(values)
        if any(episode.slopes for episode in episodes):
            none = (0.0,) * actions.shape[1]
            infos["final_info"]["slopes"] = np.array([episode.slopes or none for episode in episodes])
        rewards = np.array([episode.reward for episode in episodes])
        return following, rewards, done, np.zeros(count, dtype=bool), infos

    def _begin(self) -> np.ndarray:
        place = stratified(self._first_place, self._update - self._first_update)
        self.stage = self.schedule.stage(self.tokens_spent / self.token_budget, place, len(self.history))
        pairs = (self.num_envs + 1) // 2
        self._texts = [self._drawn() for _ in range(pairs if self.pair_text else 1)]
        subset, examples = self._texts[0]
        task = {"sparsity": self.stage.sparsity, "subset": subset, "examples": examples}
        observation, _ = self.env.reset(options=task)
        return np.tile(observation, (self.num_envs, 1))

    def _drawn(self) -> Text:
        windows = self.stage.windows
        return self.env.draw(self.np_random, windows), self.env.draw_examples(self.np_random, windows)

    def _episodes(self, actions: np.ndarray) -> list[Episode]:
        """Replay and measure one update, and record its episodes in order."""
        allocations = [self.env.budget.project(action, self.stage.sparsity) for action in actions]
        first, pairs, episodes = len(self.history), (len(actions) + 1) // 2, list[Episode]()
        texts = [self._texts[i % pairs % len(self._texts)] for i in range(len(actions))]
        trials = [
            Trial(allocation, *text, slopes_at=action if i < self.slope_episodes else None)
            for i, (action, allocation, text) in enumerate(zip(actions, allocations, texts, strict=True))
        ]
        for episode, trial, action in zip(self.replay[first:], trials, actions, strict=False):
            self._check_replayed(episode, first + len(episodes), action, trial)
            if episode.objectives:
                self.env.recall(tuple(episode.objectives))
            episodes.append(self._recorded(episode))
        trials = trials[len(episodes) :]
        if trials:
            tokens = sum(self.env.tokens(t.subset, t.examples) + self.env.slope_tokens(t) for t in trials)
            outcomes = self.env.outcomes(trials, lambda share: self.on_progress(share * tokens))
            for trial, outcome in zip(trials, outcomes, strict=True):
                measured = self._measured(actions[len(episodes)], trial, outcome)
                episodes.append(self._recorded(measured))
        return episodes

    def _recorded(self, episode: Episode) -> Episode:
        self.tokens_spent += episode.tokens
        self.history.append(episode)
        self.on_episode(episode)
        return episode

    def _check_replayed(self, episode: Episode, index: int, action: np.ndarray, trial: Trial) -> None:
        """Raise ``DataError`` unless this search would measure the same episode."""
        stage = self.stage
        measured = (episode.update, episode.target_sparsity, episode.fidelity, episode.kept, bool(episode.slopes))
        asked = (self._update, stage.sparsity, stage.fidelity, trial.allocation.kept, trial.slopes_at is not None)
        is_same_text = (episode.windows, episode.examples) == (trial.subset, trial.examples)
        if measured != asked or not is_same_text or not np.array_equal(episode.action, action):
            raise DataError(
                f"episode {index} of {self.log_name} differs from what this search proposes: it comes from another "
                "configuration, starting policy, seed, version or thread count, or the agent does not follow its seed",
                hint=f"Delete {self.log_name} to search from the start.",
            )

    def _measured(self, action: np.ndarray, trial: Trial, outcome: Outcome) -> Episode:
        return Episode(
            index=len(self.history),
            update=self._update,
            action=action,
            kept=trial.allocation.kept,
            reward=outcome.reward,
            loss=outcome.pruned.loss,
            dense_loss=outcome.dense.loss,
            target_sparsity=self.stage.sparsity,
            sparsity=trial.allocation.sparsity,
            fidelity=self.stage.fidelity,
            tokens=outcome.tokens,
            failed=outcome.failed,
            objectives=outcome.objectives,
            slopes=() if outcome.slopes is None else tuple(outcome.slopes.tolist()),
            slope_tokens=outcome.slope_tokens,
            windows=trial.subset,
            examples=trial.examples,
        )
