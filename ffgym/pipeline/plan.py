"""What the stages of a run cost, so that it can say from early on how long it will take."""

from __future__ import annotations

from ffgym.config.tables import RunConfig
from ffgym.pipeline.compare import MEASURED_UPDATES, reference_rules
from ffgym.pipeline.search import compares_with_random
from ffgym.plugins.bases import Agent
from ffgym.prepare.parts import LOADING, PREPARING
from ffgym.report.progress import Step

# What a token of each costs, in tokens of a search: measured on the demo model, training estimated.
PREPARE, SEQUENTIAL, REPORT, TRAIN = 3.2, 4.6, 0.62, 4.0
LOAD = 3_000.0  # the whole of it, in the same


def planned_steps(config: RunConfig, agent: Agent) -> list[Step]:
    """The stages of a run in order; their costs are tokens of a search."""
    data, search, points = config.data, config.search, len(config.targets)
    calibration, report = data.calibration_tokens, data.report_tokens
    steps = [Step(LOADING, LOAD), Step(PREPARING, PREPARE * calibration)]
    references, spent = len(reference_rules(config)), 1
    if agent.searches:
        spent = search.episodes * search.episode_tokens + points * search.finalists * search.final_tokens
    steps.append(Step(f"search: {config.agent.name}", spent))
    if agent.searches and compares_with_random(config):
        steps.append(Step("search: random", spent))
        references += 1
    if agent.searches:
        updates = -(-search.episodes // agent.update_size(search.episodes_per_update))
        steps.append(Step("search: where it started", min(updates, MEASURED_UPDATES) * search.episode_tokens))
    steps.append(_report(3 + references, report))
    others = (points - 1) * (1 + references)
    if config.output.sequential:
        steps += [Step("sequential calibration", SEQUENTIAL * calibration), _report(1 + others, report)]
    if config.recover.method != "none":
        steps += [Step("load", LOAD), Step("recover", TRAIN * config.recover.tokens), _report(3, report)]
    return steps


def _report(rows: int, tokens: int) -> Step:
    return Step("report", rows * REPORT * tokens, rows)
