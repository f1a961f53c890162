"""The base classes that third parties subclass: criteria, heuristics, rewards and agents; resources are in ``costs``.

A plugin is a class with a ``name``. It may carry its own pydantic ``Config`` (extra fields are refused); the table of
the same name in a run's TOML is validated by it, and the plugin finds the result in ``self.config``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from ffgym.errors import ConfigError
from ffgym.plugins.kinds import PluginKind
from ffgym.types import Evaluation, LayerStats, SublayerView, Update

if TYPE_CHECKING:
    import numpy as np
    import torch

OnUpdate = Callable[[Update], None]

# Passes that one measurement of slopes takes, in forward passes of the same tokens: one forward, and a backward that is
# customarily counted as two.
SLOPE_PASSES = 3


STATISTICS = frozenset({"mean", "square", "second_moment", "gradient", "output_gradient"})
"""What a criterion or a heuristic may need."""

MEASUREMENTS = frozenset({"kl", "reverse_kl", "accuracy", "cost"})
"""What a reward may need beside the losses."""


class PluginConfig(BaseModel):
    """Base of every plugin's ``Config``: unknown keys are errors, defaults are checked too, values are frozen.

    For an option whose default is ``None``, an empty string means ``None``, since TOML has no null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _not_given(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "of a field"
        optional = cls.model_fields[info.field_name].default is None
        return None if optional and isinstance(value, str) and not value else value

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each option means: the description of its field."""
        return {key: field.description for key, field in cls.model_fields.items() if field.description}


class Plugin:
    """What all plugins share: a name, a ``Config`` and its validated values.

    Args:
        config: an instance of the class's own ``Config``; its defaults when left out.

    Attributes:
        kind: ``"agent"``, ``"criterion"``, ..., set by the base class of the kind.
        edition: raised by its author when the same options begin to give other numbers. A bench then refuses results of
            an earlier edition instead of comparing them with new ones.
    """

    kind: ClassVar[PluginKind]
    name: ClassVar[str]
    edition: ClassVar[int] = 1
    Config: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, config: PluginConfig | None = None) -> None:
        self.config: Any = config if config is not None else type(self).Config()


class Criterion(Plugin, ABC):
    """Scores the channels of one consumer: which units of a sublayer go first.

    Attributes:
        needs: statistics to collect, any of ``{"mean", "square", "second_moment", "gradient", "output_gradient"}``.
    """

    kind = "criterion"
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score elements or channels; a unit's score is the sum over what it owns.

        Args:
            weight: the consumer's weight, shape (m, n), float32.
            stats: what ``needs`` asked for.

        Returns:
            shape (m, n) or (n,), finite, higher = kept longer.
        """


class Heuristic(Plugin, ABC):
    """A rule that gives importances without any episode. It sees weights and statistics, and no environment.

    Attributes:
        needs: statistics to keep for it, as for a criterion.
        target: sparsity that the importances are for, set by the runner; ``None`` where there is none.
    """

    kind = "heuristic"
    needs: ClassVar[frozenset[str]] = frozenset()
    target: float | None = None

    @abstractmethod
    def importance(self, sublayers: Sequence[SublayerView]) -> np.ndarray | torch.Tensor | Sequence[float]:
        """Give each sublayer its importance.

        Args:
            sublayers: 2L views, in the order layer 0 attention, layer 0 mlp, layer 1 attention, ...

        Returns:
            shape (2L,), finite, in [-1, 1]; differences of 2 span the whole range of keep ratios.
        """


class Reward(Plugin, ABC):
    """Turns what an episode measured into one number, higher = better.

    Where options decide what is measured, an instance sets its own attributes.

    Attributes:
        worst: what an episode earns whose loss is NaN or infinite.
        needs: what to measure in addition to the losses, any of ``{"kl", "reverse_kl", "accuracy", "cost"}``.
        tasks: names of the multiple-choice tasks that ``accuracy`` is measured on.
        examples: how many of their examples an episode at full fidelity is measured on, equally many of every task.
        resources: names of the resources that ``cost`` is measured in, e.g. ``("macs",)``; empty for all built-ins
            that need no measurement.
    """

    kind = "reward"
    worst: ClassVar[float] = 0.0
    needs: frozenset[str] = frozenset()
    tasks: tuple[str, ...] = ()
    examples: int = 128
    resources: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        """Compare the pruned with the dense model on the same windows and examples."""

    def objectives(self, pruned: Evaluation, dense: Evaluation) -> dict[str, float]:
        """The aims that are traded against each other, by name, higher = better.

        The names are always the same, and the numbers finite. A reward with a single aim has no objectives.
        """
        return {}

    @property
    def falls_with(self) -> Literal["loss", "kl", "reverse_kl"] | None:
        """What alone decides the reward, which falls as it rises, so that an agent may follow its slopes.

        ``None`` where it is not one of these three, or more than one.
        """
        return None if self.needs else "loss"

    @property
    def has_objectives(self) -> bool:
        """Whether it weighs aims against each other."""
        return type(self).objectives is not Reward.objectives


class Agent(Plugin, ABC):
    """Searches: proposes importances to a vector environment until its token budget is spent.

    The environment is a ``gymnasium.vector.VectorEnv`` whose actions are (num_envs, 2L) importances in the order
    layer 0 attention, layer 0 mlp, layer 1 attention, ...; every episode takes one step. Beyond Gymnasium's interface
    it has ``tokens_left`` (int), the tokens that the search may still evaluate.

    Attributes:
        slope_episodes: for how many of an update's episodes, the first ones, slopes are measured too: the derivative
            by each importance of what the reward falls with, else of the loss. Such an episode costs four times the
            tokens. It may change between updates.
        pair_text: episodes i and i + n/2 of an update are a pair with text of its own; otherwise all episodes of an
            update share theirs.
        least_episodes: the least number of episodes of an update.
        update_episodes: how many episodes its updates have, whatever ``search.episodes_per_update`` says; ``None`` for
            an agent that takes any number.
        recommendations: how many allocations it recommends at most. The finals measure more tokens where they are two
            or three, which plans and progress count.
        needs_prior: whether it cannot run without a prior.
        searches: whether it learns from episodes; ``False`` for a rule that is only measured.
        budget_conditioned: whether its proposals and recommendations follow the target sparsity in the observation.
            Only such an agent can run on a range of budgets.
        prior_mean: importances to start from, shape (2L,), set by the runner from ``prior``; ``None`` for no prior.
        budgets: under a range of budgets its ends, lower first, set by the runner; ``None`` for a single target.
        prior_ends: under a range, importances to start from at its lower and at its upper end; ``None`` for no prior.
        policy_sublayers: names of the sublayers that the policy it was started from is for; ``None`` for no policy.
    """

    kind = "agent"
    slope_episodes: int = 0
    pair_text: ClassVar[bool] = False
    least_episodes: int = 1
    update_episodes: ClassVar[int | None] = None
    recommendations: ClassVar[int] = 1
    needs_prior: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    budget_conditioned: ClassVar[bool] = False
    prior_mean: np.ndarray | None = None
    budgets: tuple[float, float] | None = None
    prior_ends: tuple[np.ndarray, np.ndarray] | None = None
    policy_sublayers: tuple[str, ...] | None = None

    @property
    def asks_slopes(self) -> bool:
        """Whether an update may ask for slopes."""
        return self.slope_episodes > 0

    def update_size(self, episodes_per_update: int) -> int:
        """Episodes in an update, where ``search.episodes_per_update`` is this."""
        return episodes_per_update if self.update_episodes is None else self.update_episodes

    def update_cost(self, episodes_per_update: int) -> int:
        """What an update costs, in episodes without slopes."""
        return self.update_size(episodes_per_update) + SLOPE_PASSES * self.slope_episodes

    def check_updates(self, episodes: int) -> None:
        """Refuse updates of fewer than ``least_episodes`` episodes.

        Raises:
            ConfigError: too few.
        """
        if episodes < self.least_episodes:
            raise ConfigError(
                f"agent {self.name!r} needs updates of {self.least_episodes} episodes or more, and "
                f"search.episodes_per_update is {episodes}",
                hint=f"Set search.episodes_per_update to {self.least_episodes} or more.",
            )

    @abstractmethod
    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Run the search. Stop when ``env.tokens_left`` is 0; call ``on_update`` after every update."""

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """Importances that the agent believes in, e.g. its policy's mean; they are measured again in the finals.

        The best of the first three is what other candidates have to beat.

        Args:
            observation: (target sparsity, fidelity), shape (2,), float32.
        """
        return []

    def state(self) -> dict[str, Any]:
        """What a later search may start from (``search.init_from``): arrays, finite numbers, strings, lists, dicts.

        An agent that loads it recommends first what this one recommends first. An interrupted search needs no state:
        it is replayed from its log.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what ``state`` of the same class returned.

        ``recommend`` works from then on, and ``learn``, which comes later, starts from it.
        """


class BatchAgent(Agent):
    """An agent that proposes a batch, is told the rewards, and proposes again. ``learn`` is that loop.

    Subclasses write ``begin``, ``ask`` and ``tell``, and ``state`` and ``load_state`` to start from another search.

    Attributes:
        progress: share of the token budget that is spent, in [0, 1], set by ``learn`` before each ``ask``.
        units: of each sublayer, shape (2L,), int64, set by ``learn`` before ``begin``; ``None`` where the environment
            does not say.
        coarse: sublayers whose units are so few that their slope is but an estimate of what the last unit is worth,
            shape (2L,), bool; ``None`` as well.
    """

    progress: float = 0.0
    units: np.ndarray | None = None
    coarse: np.ndarray | None = None

    @abstractmethod
    def begin(self, *, dimensions: int, batch: int, seed: int) -> None:
        """Get ready for actions of shape (batch, dimensions); all randomness comes from ``seed``.

        If a state has been loaded, the search starts from it.
        """

    @abstractmethod
    def ask(self, observations: np.ndarray) -> np.ndarray:
        """Propose importances, shape (batch, 2L), float32, in [-1, 1], for observations of shape (batch, 2).

        Fewer rows make a smaller update.
        """

    @abstractmethod
    def tell(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
        """Learn from rewards, shape (batch,); return diagnostics, e.g. ``{"policy/spread": 0.2}``.

        With one more parameter, ``kept=None``, it also gets the units that each action kept, shape (batch, 2L), int64,
        if the environment tells them.
        """

    def take_slopes(self, slopes: np.ndarray) -> None:
        """Take the slopes that ``slope_episodes`` asked for, shape (slope_episodes, 2L), before ``tell``.

        Not called if the environment has none.
        """
        return

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Ask, step, tell, until the environment's token budget is spent.

        Raises:
            ConfigError: an update has fewer episodes than the environment, and a wrapper around it takes all at once.
        """
        self.check_updates(env.num_envs)
        task = env.unwrapped  # wrappers pass on nothing beyond Gymnasium's interface
        self.units, self.coarse = getattr(task, "units", None), getattr(task, "coarse", None)
        dimensions = env.single_action_space.shape[0]
        self.begin(dimensions=dimensions, batch=env.num_envs, seed=seed)
        observations, _ = env.reset(seed=seed)
        tell: Any = self.tell
        takes_kept = "kept" in inspect.signature(tell).parameters
        index, tokens = 0, task.tokens_left
        while task.tokens_left > 0:
            self.progress = 1.0 - task.tokens_left / tokens
            actions = self.ask(observations)
            if task is not env and len(actions) < env.num_envs:
                raise ConfigError(
                    f"agent {self.name!r} makes an update of {len(actions)} of {env.num_envs} episodes, and a wrapper "
                    f"around the environment ({type(env).__name__}) takes them all at once",
                    hint="Let it learn on env.unwrapped.",
                )
            task.slope_episodes = self.slope_episodes
            following, rewards, _, _, infos = env.step(actions)
            final = infos.get("final_info", {})
            if self.slope_episodes and "slopes" in final:
                self.take_slopes(final["slopes"][: self.slope_episodes])
            kept = {"kept": final["kept"]} if takes_kept and "kept" in final else {}
            diagnostics = tell(observations[: len(actions)], actions, rewards, **kept)
            on_update(Update(index=index, rewards=rewards, diagnostics=diagnostics))
            observations = following
            index += 1
