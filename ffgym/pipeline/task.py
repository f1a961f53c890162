"""What all searches of one configuration share, and what is done with it outside a search.

A run, a cell of a bench and the experiments open a task, search in it, and cut its model to the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffgym.config.tables import RunConfig
from ffgym.costs.resource import Costs, Measurement
from ffgym.costs.size import SizeMeter
from ffgym.data.splits import Splits
from ffgym.envs.pruning_env import PruningEnv
from ffgym.errors import ConfigError
from ffgym.evaluation.evaluator import Evaluator
from ffgym.evaluation.perplexity import evaluate_cut
from ffgym.models.loading import LoadedModel
from ffgym.plan.plan import Plan
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent, Heuristic
from ffgym.plugins.contracts import check_importance
from ffgym.prepare.parts import LOADING, build_env, costs_in, counted_resources, load_parts, make_budget, prepare_model
from ffgym.prepare.paths import Prepared
from ffgym.prepare.workers import shared_executor
from ffgym.report.progress import Reporter
from ffgym.types import Allocation, Evaluation, JSONDict

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster


@dataclass(frozen=True)
class Task:
    """What all searches of one configuration share: the model with its paths, the splits, the environment."""

    config: RunConfig
    loaded: LoadedModel
    splits: Splits
    prepared: Prepared
    env: PruningEnv
    sizes: SizeMeter
    costs: Mapping[str, Costs]  # what the dense model costs in every resource that is counted, by name
    executor: Evaluator | None = None  # has allocations measured by workers; None for this process alone
    _asked: dict[tuple[str, str, float], np.ndarray] = field(default_factory=dict)

    @property
    def measurements(self) -> dict[str, Measurement]:
        """How costs were measured, by resource, of those that had to be."""
        return {name: costs.measurement for name, costs in self.costs.items() if costs.measurement is not None}

    def project(self, heuristic: str, options: JSONDict, sparsity: float | None = None) -> Allocation:
        """The allocation that a heuristic's importances give at a sparsity, by default the target."""
        target = self.env.sparsity if sparsity is None else sparsity
        return self.env.budget.project(self.importance(heuristic, options, target), target)

    def prior(self, heuristic: str, options: JSONDict, sparsity: float | None = None) -> np.ndarray:
        """Where an agent starts: the importances, shape (2L,), that say exactly what the heuristic's allocation keeps.

        Projecting them changes nothing. Unlike the heuristic's own, those of what is cut are not at the end of their
        range, where exploration would be clipped; those of what is kept whole are.
        """
        return self.env.budget.importance(self.project(heuristic, options, sparsity).kept)

    def importance(self, heuristic: str, options: JSONDict, sparsity: float) -> np.ndarray:
        """Importances of a heuristic that are wanted for a sparsity, shape (2L,), float32; it is asked once."""
        key = heuristic, repr(options), sparsity
        if key not in self._asked:
            rule: Heuristic = manager.create("heuristic", heuristic, options)
            rule.target = sparsity
            self._asked[key] = check_importance(rule, self.prepared.views)
        return self._asked[key]


def needs_of(heuristics: Sequence[tuple[str, JSONDict]]) -> frozenset[str]:
    """Statistics that heuristics need which have these names and options."""
    rules: list[Heuristic] = [manager.create("heuristic", name, options) for name, options in heuristics]
    return frozenset[str]().union(*(rule.needs for rule in rules))


def open_task(
    config: RunConfig,
    heuristics: Sequence[tuple[str, JSONDict]],
    reporter: Reporter,
    *,
    plan: Plan | None = None,
    recorded: Path | None = None,
    cluster: Cluster | None = None,
) -> Task:
    """Load, split, prepare.

    Args:
        heuristics: (name, options) of every heuristic that will be asked; what they need is kept.
        plan: of the run; made where left out.
        recorded: folder of the run, where it goes on: what it has measured before is not measured again.
    """
    with reporter.stage(LOADING, 1):
        loaded, splits = load_parts(config, plan)
    reporter.print(f"{loaded.description}, {loaded.dtype_name} on {loaded.device}")
    needs = needs_of(heuristics)
    costs = _costs(config, loaded.model, reporter, recorded)
    budget = make_budget(config, loaded.model, costs)
    prepared = prepare_model(config, loaded, splits.calibration.windows, keep=needs, reporter=reporter)
    executor = None if cluster is None else shared_executor(cluster, config, loaded, prepared, splits, needs)
    env = build_env(config, prepared, splits.search.windows, budget, loaded, costs=costs, executor=executor)
    return Task(config, loaded, splits, prepared, env, SizeMeter(prepared.prunable, costs), costs, executor)


def _costs(config: RunConfig, model: Any, reporter: Reporter, recorded: Path | None) -> dict[str, Costs]:
    """What the model costs in every resource that is counted; prints where measurements come from."""
    found: dict[str, Costs] = {}
    for name, resource in counted_resources(config).items():
        if not resource.is_measured():
            found[name] = costs_in(resource, config, model)
            continue
        with reporter.stage(f"{name} table", 1) as stage:
            found[name] = costs_in(resource, config, model, recorded=recorded, on_progress=stage, notify=reporter.print)
        if measurement := found[name].measurement:
            reporter.print(f"{name}: {measurement.summary}; table {measurement.digest[:12]}")
    return found


def at_target(task: Task, target: float) -> Task:
    """The task at one sparsity: a point of a front as a run at a single target would see it."""
    config = task.config
    if not config.prune.is_range:
        return task
    prune = config.prune.model_copy(update={"sparsity": target})
    output = config.output.model_copy(update={"save_at": None, "save_all": False})
    return with_config(task, config.model_copy(update={"prune": prune, "output": output}))


def with_config(task: Task, config: RunConfig) -> Task:
    """The same model, splits and paths under a configuration of another agent, reward, seed, search or sparsity."""
    model, windows = task.loaded.model, task.splits.search.windows
    others = {name: by for name, by in counted_resources(config).items() if name not in task.costs}  # of its reward
    costs = {**task.costs, **{name: costs_in(resource, config, model) for name, resource in others.items()}}
    budget = make_budget(config, model, costs)
    env = build_env(config, task.prepared, windows, budget, task.loaded, costs=costs, executor=task.executor)
    return replace(task, config=config, env=env)


def give_prior(agent: Agent, task: Task) -> None:
    """Tell an agent where to start, and under a range of budgets between which ends."""
    prune, prior = task.config.prune, task.config.prior
    names = tuple(sublayer.name for sublayer in task.prepared.prunable.sublayers)
    if agent.policy_sublayers not in (None, names):
        raise ConfigError(
            f"search.init_from = {task.config.search.init_from!r} holds a policy for {len(agent.policy_sublayers)} "
            f"sublayers, {agent.policy_sublayers[0]} to {agent.policy_sublayers[-1]}; {task.config.model.name} has "
            f"{len(names)}, {names[0]} to {names[-1]}",
            hint="Start from a run on a model of the same depth, or leave --init-from out.",
        )
    if prior.name != "none":
        agent.prior_mean = task.prior(prior.name, prior.options)
    if prune.is_range:
        low, high = agent.budgets = prune.ends
        if prior.name != "none":
            prior_at = partial(task.prior, prior.name, prior.options)
            agent.prior_ends = prior_at(low), prior_at(high)


@contextmanager
def cut_to(task: Task, kept: Sequence[int], *, calibrated: bool = True) -> Iterator[None]:
    """The model cut to ``kept`` units per sublayer, refitted or not, and put back afterwards."""
    prunable = task.prepared.prunable
    try:
        prunable.cut(kept, calibrated=calibrated)
        yield
    finally:
        prunable.restore()


def on_report(task: Task, kept: Sequence[int], *, calibrated: bool = True) -> Evaluation:
    """The model cut to ``kept`` units per sublayer, on the report split."""
    with cut_to(task, kept, calibrated=calibrated):
        windows = task.splits.report.windows
        return evaluate_cut(task.prepared.prunable, windows, tokens_per_batch=task.env.tokens_per_batch)
