"""What a bench refuses: unequal terms, mixed models, results of another configuration."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffgym.bench.cell import CELL_RESULT, Cell
from ffgym.bench.file import Bench
from ffgym.bench.table import CellResult
from ffgym.config.mixture import shares
from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError
from ffgym.pipeline.agent import policy_digest
from ffgym.pipeline.start import check_plugins
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import update_episodes
from ffgym.prepare import configured
from ffgym.prepare.parts import counted_resources, named_table, table_digest
from ffgym.types import JSONDict

DRIFT = 0.01  # nats, 1 % of perplexity: between processors and dtypes, committed benches differ by 0.0008 at most


def check_benches(benches: Sequence[Bench]) -> dict[Path, CellResult]:
    """Refuse what cannot be compared, before anything is computed; returns the results that are there, by file."""
    cells = [cell for each in benches for cell in each.cells]
    models = {_model(cell.config) for cell in cells}
    if len(models) > 1:
        raise ConfigError(
            f"one bench compares on one model, these name {', '.join(sorted(models))}",
            hint="Call `ffgym bench` once for each model.",
        )
    for each in benches:
        _check_equal_terms(each)
    results = {path: CELL_RESULT.read(path) for each in benches for path in each.results}
    digests: dict[Path, str] = {}
    for cell in cells:
        if cell.config.prune.is_range:
            raise ConfigError(
                f"a bench compares at one target, and {cell.label} has prune.sparsity = {cell.config.prune.sparsity!r}",
                hint="Give one target, e.g. sparsity = 0.2; experiments/range compares fronts.",
            )
        if cell.config.recover.method != "none":
            raise ConfigError(
                f"a bench compares searches, and {cell.label} has recover.method = {cell.config.recover.method!r}",
                hint="Leave [recover] out, and recover a saved model with `ffgym recover`.",
            )
        if cell.config.workers.count > 1:
            raise ConfigError(
                f"a worker computes a whole cell, and {cell.label} has workers.count = {cell.config.workers.count}",
                hint="Leave [run.workers] out: ffgym bench --workers N computes N cells at a time.",
            )
        configured.check_agent_fits(cell.config)
        check_plugins(cell.config)
        _check_measurements(cell)
        if digests.setdefault(cell.path.resolve(), cell.digest) != cell.digest:
            raise ConfigError(
                f"two benches would write {cell.path} for different configurations",
                hint="Give each a `results` folder of its own.",
            )
        if stored := results.get(cell.path):
            changed = configured.changed_since(stored.settings, cell.config) + unanswered(stored, cell)
            changed += configured.outgrown(stored.editions, cell.config)
            policy = policy_digest(cell.config)
            if None not in (policy, stored.policy) and policy != stored.policy:
                changed.append(f"search.init_from = {cell.config.search.init_from!r} holds another policy now")
            if stored.latency != table_digest(cell.config):
                changed.append(f"prune.latency_table = {cell.config.prune.latency_table!r} holds other times now")
            if changed:
                raise ConfigError(
                    f"{cell.path} holds the result of another configuration: {'; '.join(changed)}",
                    hint="Point `results` at another folder, or delete that file to compute it again.",
                )
    for each in benches:
        check_dense_losses(each, results)
    return results


def check_dense_losses(bench: Bench, results: Mapping[Path, CellResult]) -> None:
    """Refuse results of one table that are of two models or texts, which their settings name and do not hold."""
    losses = {cell.path: results[cell.path].dense_loss for cell in bench.cells if cell.path in results}
    if not losses:
        return
    usual = statistics.median_low(losses.values())
    odd = max(losses, key=lambda path: abs(losses[path] - usual))
    if abs(losses[odd] - usual) > DRIFT:
        raise ConfigError(
            f"{odd} has dense_loss = {losses[odd]:.4f}, other results of {bench.file} have {usual:.4f}: it is of "
            "another model or report text than they are",
            hint="Delete it to compute it again; or delete the others, if it is they that are out of date.",
        )


def _check_measurements(cell: Cell) -> None:
    """Refuse a cell that would measure what its resources cost."""
    for name, resource in counted_resources(cell.config).items():
        if resource.is_measured() and named_table(cell.config, name) is None:
            hint = "Make a table with `ffgym latency MODEL --output FILE`, and name it as prune.latency_table."
            raise ConfigError(
                f"cells of one table count the same {name}, and {cell.label} names none: two sittings, or two "
                "processes that measure the model at once, would each count their own",
                hint=hint if name == "latency" else "Take a resource that has a price per unit.",
            )


def unanswered(stored: CellResult, cell: Cell) -> list[str]:
    """What the cell asks for and a stored result of the same work does not hold."""
    unsaid = []
    if cell.plain and stored.final.plain_loss is None:
        unsaid.append("the bench asks for plain = true, and this result was computed with plain = false")
    if stored.asked_marks < cell.marks and cell.config.searches:
        unsaid.append(
            f"the bench asks for marks = {cell.marks}, and this result was computed with {stored.asked_marks}"
        )
    return unsaid


def _model(config: RunConfig) -> str:
    """Which model a configuration names, its revision included."""
    return config.model.name if config.model.revision is None else f"{config.model.name} at {config.model.revision}"


def _check_equal_terms(bench: Bench) -> None:
    """Refuse cells of one table that differ in splits, in what the budget counts, or in tokens to search for."""
    first: dict[str, tuple[Cell, Any]] = {}
    for cell in bench.cells:
        for term, value in _terms(cell.config).items():
            other, expected = first.setdefault(term, (cell, value))
            if value != expected:
                raise ConfigError(
                    f"{bench.file}: one table compares on equal terms, and {term} is {expected!r} for {other.label} "
                    f"and {value!r} for {cell.label}",
                    hint="Write a bench file for each.",
                )


def _terms(config: RunConfig) -> JSONDict:
    """What has to be the same in all cells of one table; a rule searches nothing, so its search may differ.

    Texts to prepare and search with may differ too, and how long they are. What they read of the report's own corpus
    may not: the report's windows follow it.
    """
    search, data = config.search, config.data
    prune = config.prune
    terms: JSONDict = {"prune.resource": prune.resource, "prune.latency_table": prune.latency_table}
    terms |= {f"data.{key}": value for key, value in data.model_dump(mode="json").items()}
    for key in ("data.calibration", "data.search"):
        if not shares(terms[key]).keys() & shares(data.report).keys():
            terms[key] = terms[f"{key}_tokens"] = "no text of data.report"
    if not config.searches:
        return terms
    episode = -(-search.episode_tokens // data.window) * data.window
    agent: Agent = manager.create("agent", config.agent.name, config.agent.options)
    _, update = update_episodes(agent, search.episodes_per_update)
    return {
        **terms,
        "the search's tokens (episodes in whole updates, of whole windows)": (
            -(-search.episodes // update) * update * episode
        ),
        "search.finalists": search.finalists,
        "search.final_tokens": search.final_tokens,
    }
