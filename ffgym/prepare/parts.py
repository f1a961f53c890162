"""From plain data to an environment: what ``gymnasium.make("ffgym/Pruning-v0", ...)`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.costs.latency import LatencyTable, layer_shapes, read_table
from ffgym.costs.latency_cache import Say, cached_table, say_if_busy
from ffgym.data.examples import EncodedExample, check_search_tasks, encode, search_examples
from ffgym.data.splits import Splits, make_splits
from ffgym.envs.pruning_env import PruningEnv
from ffgym.errors import ConfigError, UnknownNameError
from ffgym.models.families import family_of
from ffgym.models.loading import LoadedModel, load
from ffgym.plugins import manager
from ffgym.plugins.bases import Reward
from ffgym.plugins.contracts import check_wishes
from ffgym.prepare.paths import Prepared, prepare
from ffgym.prepare.statistics import OnProgress
from ffgym.pruning.budget import Budget
from ffgym.types import Resource

CHECKED_WINDOW = 128
CHECKED_RIDGE = 0.01

CHEAP: tuple[Resource, ...] = ("params", "macs", "kv")
"""Resources whose cost is a sum and not a measurement: what a reward gets that needs ``cost`` and names none."""


def load_parts(config: RunConfig) -> tuple[LoadedModel, Splits]:
    """Load the model and cut the three splits."""
    loaded = load(
        config.model.name, revision=config.model.revision, dtype=config.model.dtype, device=config.model.device
    )
    return loaded, cut_splits(config, loaded)


def cut_splits(config: RunConfig, loaded: LoadedModel) -> Splits:
    """The three splits in the model's tokens.

    Raises:
        DataError: a corpus that is missing or too short, or splits that overlap.
        ModelError: a tokenizer that is not the model's.
    """
    splits = make_splits(config.data, loaded.tokenizer, context_limit=loaded.context_limit)
    for split in (splits.calibration, splits.search, splits.report):
        loaded.check_ids(split.windows, split.name)
    return splits


def tokens_per_batch(device: torch.device | str) -> int:
    """Tokens of one forward pass: what keeps the caches warm on a CPU, and an accelerator busy."""
    return 4096 if torch.device(device).type == "cpu" else 16384


def prepare_model(
    config: RunConfig,
    loaded: LoadedModel,
    windows: torch.Tensor,
    *,
    keep: frozenset[str] = frozenset(),
    on_progress: OnProgress | None = None,
) -> Prepared:
    """Statistics, order and refits as the configuration says."""
    return prepare(
        loaded.model,
        manager.create("criterion", config.criterion.name, config.criterion.options),
        windows,
        calibration=config.prune.calibration,
        ridge=None if config.prune.ridge == "auto" else float(config.prune.ridge),
        keep=keep,
        tokens_per_batch=tokens_per_batch(loaded.device),
        on_progress=on_progress,
    )


def counts_latency(config: RunConfig) -> bool:
    """Whether the budget or the reward counts measured latency."""
    return _counts_latency(config, make_reward(config))


def _counts_latency(config: RunConfig, reward: Reward) -> bool:
    return config.prune.resource == "latency" or ("cost" in reward.needs and "latency" in reward.resources)


def make_latency(
    config: RunConfig, model: Any, *, on_progress: OnProgress | None = None, say: Say | None = None
) -> LatencyTable | None:
    """The latency table of a run on a dense model; ``None`` where nothing counts latency.

    The file that ``prune.latency_table`` names, or else this machine's own from the cache, timed now if it is missing.

    Raises:
        ConfigError: the named file is no latency table.
        BudgetError: it is of another model or context, or the model takes fewer than ``prune.context`` tokens.
    """
    prune = config.prune
    if not counts_latency(config):
        return None
    if prune.latency_table is None:
        return cached_table(model, context=prune.context, on_progress=on_progress, say=say)
    table = read_table(Path(prune.latency_table).expanduser())
    table.check_fits(model, context=prune.context, source=prune.latency_table)
    say_if_busy(table, say)
    return table


def latency_digest(config: RunConfig) -> str | None:
    """Digest of the latency table that ``prune.latency_table`` names; ``None`` where it names none.

    Raises:
        ConfigError: the named file is no latency table.
    """
    named = config.prune.latency_table
    return None if named is None else read_table(Path(named).expanduser()).digest


def make_budget(config: RunConfig, model: Any, latency: LatencyTable | None = None) -> Budget:
    """The budget of a run on a dense model.

    Args:
        config: the run.
        model: the dense model.
        latency: the times that a latency budget counts; see `make_latency`, which is asked where it is left out.

    Raises:
        BudgetError: the sparsity is out of reach.
        ModelError: a stock checkpoint is asked for, which the family does not have, or not with this calibration.
    """
    budget = budget_in(config.prune.resource, config, model, latency)
    budget.check(config.prune.ends[1])
    return budget


def budget_in(resource: Resource, config: RunConfig, model: Any, latency: LatencyTable | None = None) -> Budget:
    """What allocations of a dense model cost in a resource, which need not be the one that the run's budget is in.

    Raises:
        ModelError: a stock checkpoint is asked for, which the family does not have, or not with this calibration.
    """
    family, prune = family_of(model), config.prune
    if prune.uniform and prune.calibration == "affine":
        family.check_stock_biases(model)
    tables = None
    if resource == "latency":
        table = latency or make_latency(config, model)
        assert table is not None, "asked for by the budget or the reward"
        tables = table.cost_tables(layer_shapes(model))
    return Budget(
        family.sublayers(model),
        resource=resource,
        min_units=prune.min_units,
        align=prune.align,
        shapes=family.stock_shapes(model) if prune.uniform else None,
        context=prune.context,
        kv_bytes=model.get_output_embeddings().weight.element_size(),
        cost_tables=tables,
    )


def make_reward(config: RunConfig) -> Reward:
    """The reward of a run, with what it asks for checked; loads nothing.

    Raises:
        ConfigError: an option that it refuses, accuracy without tasks, a cost that the budget fixes already, or a
            latency table that nothing reads.
        UnknownNameError: no such reward, task or resource.
    """
    reward = manager.create("reward", config.reward.name, config.reward.options)
    check_wishes(reward)
    if "accuracy" in reward.needs:
        if not reward.tasks:
            raise ConfigError(
                f"reward {config.reward.name!r} needs accuracy, and names no tasks to measure it on",
                hint="Name some, e.g. --set 'reward.tasks=[\"arc_easy\"]', or give accuracy no weight.",
            )
        check_search_tasks(reward.tasks)
    if "cost" in reward.needs:
        known = get_args(Resource)
        for resource in reward.resources:
            if resource not in known:
                raise UnknownNameError("resource", resource, known)
            if resource == config.prune.resource:
                raise ConfigError(
                    f"reward {config.reward.name!r} weighs {resource}, and the budget is in {resource}: it costs the "
                    "same whatever the allocation",
                    hint=f"Weigh another resource ({', '.join(r for r in known if r != resource)}), or prune another.",
                )
    if config.prune.latency_table is not None and not _counts_latency(config, reward):
        raise ConfigError(
            f"prune.latency_table is given, but prune.resource is {config.prune.resource!r}, reward"
            f" {config.reward.name!r} weighs no latency either, and nothing would read it",
            hint="Add --resource latency, or leave the table out.",
        )
    return reward


def build_env(
    config: RunConfig,
    prepared: Prepared,
    windows: torch.Tensor,
    budget: Budget,
    *,
    loaded: LoadedModel | None = None,
    latency: LatencyTable | None = None,
) -> PruningEnv:
    """The stationary environment of a run.

    Args:
        config: the run.
        prepared: model with paths.
        windows: search split, shape (windows, length), int64.
        budget: see ``make_budget``.
        loaded: the model's tokenizer and context, for a reward that needs accuracy.
        latency: the times that a budget or a reward in latency counts.
    """
    reward, model = make_reward(config), prepared.prunable.model
    examples = task_examples(reward.tasks, loaded) if loaded is not None and "accuracy" in reward.needs else ()
    named = [resource for resource in get_args(Resource) if resource in reward.resources]
    resources: Sequence[Resource] = (named or CHEAP) if "cost" in reward.needs else ()
    return PruningEnv(
        prepared.prunable,
        reward,
        windows,
        budget,
        sparsity=config.prune.target,
        episode_windows=-(-config.search.episode_tokens // config.data.window),
        calibrated=config.prune.calibration != "none",
        tokens_per_batch=tokens_per_batch(model.device),
        examples=examples,
        prices={resource: budget_in(resource, config, model, latency) for resource in resources},
    )


def task_examples(tasks: Sequence[str], loaded: LoadedModel) -> list[EncodedExample]:
    """All examples of some tasks that a search may be rewarded on, as token ids, task after task."""
    limit = loaded.context_limit
    return [encode(e, loaded.tokenizer, context_limit=limit) for task in tasks for e in search_examples(task)]


def make_pruning_env(config: RunConfig | dict[str, Any] | None = None, **tables: Any) -> PruningEnv:
    """Build the environment from plain data.

    Args:
        config: a ``RunConfig`` or the same as nested dicts; defaults where left out.
        tables: tables of the configuration, e.g. ``prune={"sparsity": 0.3}``; not beside a ``RunConfig``.

    Raises:
        FFGymError: an unknown table, key or plugin, an impossible value, a model or text that does not load.
    """
    if config is None or isinstance(config, dict):
        config = load_config(**{**(config or {}), **tables})
    elif tables:
        raise ConfigError(
            f"config is a whole RunConfig already, and {', '.join(tables)} came beside it",
            hint="Give load_config() all tables, or leave config out and give them here.",
        )
    make_reward(config)
    loaded, splits = load_parts(config)
    budget = make_budget(config, loaded.model)
    prepared = prepare_model(config, loaded, splits.calibration.windows)
    return build_env(config, prepared, splits.search.windows, budget, loaded=loaded)


def shrunk(config: RunConfig) -> RunConfig:
    """The same run on a handful of short windows, for checks of the interface that do not look at the numbers.

    Windows of at most 128 tokens, two of them for statistics and two to search on, one per episode. An automatic ridge
    strength, whose search takes most of the time, is a number instead.
    """
    plain = config.model_dump()
    window = min(config.data.window, CHECKED_WINDOW)
    plain["data"] |= {"window": window, "report_tokens": window}
    plain["data"] |= {"calibration_tokens": 2 * window, "search_tokens": 2 * window}
    plain["search"] |= {"episode_tokens": window, "final_tokens": window}
    if config.prune.ridge == "auto":
        plain["prune"] |= {"ridge": CHECKED_RIDGE}
    return RunConfig.model_validate(plain)
