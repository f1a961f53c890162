"""The plan of a run: what its stages need, and how long they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ffgym.config.tables import RunConfig
from ffgym.data.cache import ADDED_TO
from ffgym.data.examples import EXAMPLE_TOKENS
from ffgym.evaluation.evaluator import DIVERGENCES
from ffgym.evaluation.known import KnownLosses
from ffgym.pipeline.compare import asked_rules, reference_rules
from ffgym.pipeline.search import compares_with_random
from ffgym.pipeline.task import needs_of
from ffgym.plan.plan import Plan
from ffgym.plan.shape import ModelShape
from ffgym.plugins.bases import Agent
from ffgym.prepare.parts import LOADING, PREPARING, make_reward, settings_of
from ffgym.prepare.planning import placed, plan_of
from ffgym.prepare.store import made_under
from ffgym.pruning.budget import Budget
from ffgym.report.progress import Step
from ffgym.search.finals import expected_tokens


def plan_run(config: RunConfig, agent: Agent) -> Plan:
    """What a run needs of this machine; a sparsity that is out of reach is refused."""
    search, window = config.search, config.data.window
    needs = needs_of(asked_rules(config))
    plan = plan_of(config, needs)
    if config.prune.resource == "params":  # other resources need the model itself
        prune = config.prune
        Budget(plan.shape.sublayers, min_units=prune.min_units, align=prune.align).check(prune.ends[1])
    compared = agent.searches and compares_with_random(config)
    size = agent.update_size(search.episodes_per_update)
    recommended = [agent.recommendations, 0][: 1 + compared]  # of the search, and of the random draws
    recovers, main = config.recover.method != "none", (config.main_target,)
    models = config.targets if config.output.save_all else main
    rows, others = _report_rows(config, compared=compared)
    reward = make_reward(config)
    asked = reward.examples * EXAMPLE_TOKENS if "accuracy" in reward.needs else 0  # tokens of an episode's examples
    episode_tokens = plan.load.episode_tokens + asked
    reserved = search.final_tokens * episode_tokens // plan.load.episode_tokens
    finals = [expected_tokens(search.finalists, reserved, count, config.final_windows) for count in recommended]
    final_tokens = sum(finals) // len(finals)
    store = made_under(settings_of(config, needs, plan.load.dtype_name))
    load = replace(
        plan.load,
        episode_tokens=episode_tokens,
        episodes_per_update=size,
        updates=-(-search.episodes * plan.load.episode_tokens // (size * episode_tokens)),
        slopes=agent.asks_slopes,
        diverging=bool(reward.needs & DIVERGENCES),
        searches=1 + compared,
        texts=max(1, size // 2) if agent.pair_text and not reward.has_objectives else 1,
        search_tokens=config.data.whole_tokens("search"),
        is_prepared=store is not None,
        known_tokens=0 if store is None else window * len(KnownLosses(store / ADDED_TO)),
        finalists=search.finalists if agent.searches else 0,
        final_tokens=max(1, round(final_tokens / search.finalists / window)) * window,
        report_tokens=config.data.whole_tokens("report"),
        report_rows=rows + others + 3 * recovers,
        saves=models * config.output.save_model + main * recovers,
        train_tokens=config.recover.tokens if recovers else 0,
        workers=config.workers.count,
        parts=_parts(config, agent, follows_slopes=follows_slopes(config, agent, plan.shape), compared=compared),
        elsewhere=config.workers.ray_address is not None,
    )
    output = plan.output if config.output.dir is None else Path(config.output.dir)
    return placed(config, replace(plan, load=load, output=output))


def follows_slopes(config: RunConfig, agent: Agent, shape: ModelShape) -> bool:
    """Whether a search's updates are episodes with slopes."""
    if agent.slope_episodes or not agent.asks_slopes:
        return agent.asks_slopes
    return make_reward(config).falls_with is not None and not config.prune.uniform and not shape.has_experts


def _parts(
    config: RunConfig, agent: Agent, *, follows_slopes: bool, compared: bool
) -> tuple[tuple[float, int], tuple[float, int]]:
    """Of the agent's updates, and of those of the search that it is compared with.

    An episode with slopes is divided into its windows, any other one is a part.
    """
    episodes, windows, always = config.search.episodes_per_update, config.episode_windows, agent.slope_episodes
    size, own = agent.update_size(episodes), 1 / (1 + compared)
    with_slopes = size - always + always * windows if always else windows
    return (own, with_slopes if follows_slopes else size), (1 - own, episodes)


def _report_rows(config: RunConfig, *, compared: bool) -> tuple[int, int]:
    """Rows that are measured: of the main target, and of all other points of a front."""
    references, others = len(reference_rules(config)), len(config.targets) - 1
    return 3 + references + compared, others * (references + 1 + config.output.save_all)


def planned_steps(config: RunConfig, plan: Plan) -> list[Step]:
    """The stages of a run in order, as its progress names them."""
    seconds = {stage.name: plan.seconds(stage) for stage in plan.stages}
    load, measured = plan.load, next(stage for stage in plan.stages if stage.name == "report")
    rows, others = _report_rows(config, compared=load.searches > 1)
    per_token = seconds["report"] / measured.tokens

    def report(count: int) -> Step:
        return Step("report", count * load.report_tokens * per_token, count)

    search = next(stage for stage in plan.stages if stage.name == "search")
    finals = seconds.get("finals", 0.0) / load.searches
    own, random = (plan.seconds(replace(search, parts=parts)) for parts in (search.parts[:1], search.parts[1:]))
    steps = [Step(LOADING, seconds["load"], computes=False), Step(PREPARING, seconds["prepare"])]
    steps.append(Step(f"search: {config.agent.name}", own + finals))
    if load.searches > 1:
        steps.append(Step("search: random", random + finals))
    steps.append(report(rows))
    if others:
        steps.append(report(others))
    if load.train_tokens:
        steps += [Step("load", seconds["load"]), Step("recover", seconds["recover"]), report(3)]
    return steps
