"""Several aims at once: perplexity, task accuracy, and a cost that the budget leaves open."""

from __future__ import annotations

from pydantic import Field, model_validator

from ffgym.errors import ConfigError
from ffgym.plugins.bases import PluginConfig, Reward
from ffgym.rewards.perplexity import perplexity_ratio
from ffgym.types import Evaluation


class MultiObjective(Reward):
    """Weighted mean of what is left of the dense model and what is saved of its cost.

    With weights w >= 0, not all 0,

        R = (w_p P + w_a A + w_c C) / (w_p + w_a + w_c)

        P = PPL_dense / PPL_pruned                   1 when nothing is lost, towards 0 as the model breaks
        A = 1 + accuracy_pruned - accuracy_dense     1 when nothing is lost, 0.9 when ten points are
        C = 1 - cost_pruned / cost_dense             0 when nothing is saved, 0.3 when 30 % are; never below 0

    so that equal weights trade one percent of perplexity for one point of accuracy for one percent of the cost. P and A
    are measured on the same tokens and examples for both models; C counts the prunable sublayers. The budget fixes one
    resource, so the cost is in another one: allocations of the same size in parameters differ in MACs and in KV cache.
    A term of weight 0 is neither measured nor an objective.

    The weights choose one winner. The objectives themselves, P, accuracy_pruned and C, are recorded for every episode.
    """

    name = "multi-objective"

    class Config(PluginConfig):
        """Options of the table ``[reward]``."""

        perplexity: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight of the perplexity ratio")
        accuracy: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight of the task accuracy")
        cost: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight of the saved cost")
        tasks: tuple[str, ...] = Field(
            default=("arc_easy",), description="multiple-choice tasks that accuracy is measured on"
        )
        examples: int = Field(default=32, ge=1, description="examples of these tasks for one episode at full fidelity")
        resource: str = Field(default="macs", description="resource of the saved cost; not the budget's")

        @model_validator(mode="after")
        def _something_counts(self) -> MultiObjective.Config:
            if self.perplexity == self.accuracy == self.cost == 0:
                raise ConfigError(
                    "the weights of reward 'multi-objective' are all 0: perplexity, accuracy, cost",
                    hint="Give at least one of them a weight above 0, e.g. --set reward.perplexity=1.",
                )
            return self

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        weights = {"accuracy": self.config.accuracy, "cost": self.config.cost}
        self.needs = frozenset(name for name, weight in weights.items() if weight > 0)
        self.tasks = self.config.tasks
        self.examples = self.config.examples
        self.resources = (self.config.resource,)

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        """Weigh the terms."""
        config = self.config
        weighted = config.perplexity * perplexity_ratio(pruned, dense) if config.perplexity else 0.0
        if config.accuracy:
            weighted += config.accuracy * (1 + _accuracy(pruned) - _accuracy(dense))
        if config.cost:
            weighted += config.cost * max(0.0, self._saved(pruned, dense))
        return float(weighted / (config.perplexity + config.accuracy + config.cost))

    def objectives(self, pruned: Evaluation, dense: Evaluation) -> dict[str, float]:
        """The terms that have a weight, accuracy as it is."""
        named: dict[str, float] = {}
        if self.config.perplexity:
            named["perplexity_ratio"] = perplexity_ratio(pruned, dense)
        if self.config.accuracy:
            named["accuracy"] = _accuracy(pruned)
        if self.config.cost:
            named[f"{self.config.resource}_saved"] = self._saved(pruned, dense)
        return named

    @property
    def has_objectives(self) -> bool:
        """Whether two or more terms have a weight."""
        return sum(bool(weight) for weight in (self.config.perplexity, self.config.accuracy, self.config.cost)) > 1

    def _saved(self, pruned: Evaluation, dense: Evaluation) -> float:
        assert pruned.costs is not None, "needs cost"
        assert dense.costs is not None, "needs cost"
        return 1 - pruned.costs[self.config.resource] / dense.costs[self.config.resource]


def _accuracy(evaluation: Evaluation) -> float:
    assert evaluation.accuracy is not None, "needs accuracy"
    return evaluation.accuracy
