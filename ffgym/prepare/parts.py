"""From a configuration to the parts of a run: model and text, prepared paths, budget, reward, environment, schedule."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ffgym.config.mixture import Corpora, shares
from ffgym.config.tables import DataTable, RunConfig
from ffgym.costs.latency_cache import check_context
from ffgym.costs.latency_table import read_table
from ffgym.costs.resource import (
    Costs,
    Resource,
    costs_of,
    resource_class,
    resource_named,
    standard_resources,
)
from ffgym.data.cache import ADDED_TO
from ffgym.data.corpora import Role, check_text
from ffgym.data.examples import EncodedExample, check_search_tasks, encode, search_examples
from ffgym.data.splits import ROLES, Splits, make_splits
from ffgym.envs.pruning_env import PruningEnv
from ffgym.errors import ConfigError, ModelError, PluginError, WorkerError
from ffgym.evaluation.evaluator import Evaluator, ModelEvaluator
from ffgym.evaluation.perplexity import check_logits
from ffgym.models.cut import PrunableModel, check_cutting, check_sorting
from ffgym.models.families import family_of
from ffgym.models.loading import LoadedModel, config_of, context_limit, load
from ffgym.models.placement import choose_device, tokens_per_batch
from ffgym.plan.plan import Plan
from ffgym.plan.shape import skeleton_of
from ffgym.plugins import manager
from ffgym.plugins.bases import Criterion, Reward
from ffgym.prepare.calibrations import calibration_class
from ffgym.prepare.paths import OnLayer, Prepared, prepare
from ffgym.prepare.planning import plan_of
from ffgym.prepare.store import decisive_code, is_stored, opened_or_prepared, store_key, weights_digest
from ffgym.pruning.budget import Budget
from ffgym.report.progress import Reporter
from ffgym.types import Notify, OnStep, do_nothing

CHECKED_TOKENS = 32  # of another package's family
LOADING = "load model and text"
PREPARING = "collect statistics, order and factorise"


def load_parts(config: RunConfig, plan: Plan | None = None) -> tuple[LoadedModel, Splits]:
    """Load the model as its plan says, which is made where left out, and cut the three splits.

    Raises:
        FitError: preparing it needs more memory than there is.
        ConfigError: it is to be streamed, and something needs it in memory.
        DataError, UnknownNameError: text that is not there.
        PluginError: its family is another package's and does not fit it.
    """
    model, plan = config.model, plan or plan_of(config)
    plan.check()
    check_texts(config.data)
    loaded = load(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        streamed=plan.load.streamed,
    )
    splits = cut_splits(config, loaded)
    if loaded.stream is None:
        check_family(loaded.model, splits.calibration.windows[:1, :CHECKED_TOKENS])
    return loaded, splits


def check_family(model: Any, ids: torch.Tensor) -> None:
    """Hold another package's family to what every number of a run relies on; those of ffgym have tests.

    Args:
        model: a dense causal LM in memory, which is as it was afterwards.
        ids: some token ids, shape (1, length), int64.

    Raises:
        PluginError: the logits are not what ffgym takes them for, or change when units are sorted, or the model does
            not run with a unit less.
    """
    family = family_of(model)
    if manager.is_built_in(family):
        return
    try:
        check_logits(model, ids[0])
    except ModelError as error:
        hint = "ffgym cannot prune this architecture."
        raise PluginError(f"{manager.described(family)}: {error.message}", hint=hint) from error
    prunable = PrunableModel(model)
    check_sorting(prunable, ids)
    check_cutting(prunable, ids)


def check_texts(data: DataTable) -> None:
    """Refuse corpora that are not there, before a model is loaded or fetched; errors as in `check_text`."""
    for role in ROLES:
        for name in shares(getattr(data, role)):
            check_text(name)


def splits_of(data: DataTable, tokenizer: Any, *, context_limit: int) -> Splits:
    """The three splits that a table ``[data]`` describes; errors as in `make_splits`."""
    corpora: dict[Role, Corpora] = {role: getattr(data, role) for role in ROLES}
    tokens: dict[Role, int] = {role: getattr(data, f"{role}_tokens") for role in ROLES}
    return make_splits(corpora, tokens, data.window, tokenizer, context_limit=context_limit, bos=data.bos)


def cut_splits(config: RunConfig, loaded: LoadedModel) -> Splits:
    """The three splits in the model's tokens.

    Raises:
        DataError: a corpus that is missing or too short, or splits that overlap.
        ModelError: a tokenizer that is not the model's.
    """
    splits = splits_of(config.data, loaded.tokenizer, context_limit=loaded.context_limit)
    for split in (splits.calibration, splits.search, splits.report):
        loaded.check_ids(split.windows, split.name)
    return splits


def prepare_model(
    config: RunConfig,
    loaded: LoadedModel,
    windows: torch.Tensor,
    *,
    keep: frozenset[str] = frozenset(),
    reporter: Reporter | None = None,
    key: str | None = None,
) -> Prepared:
    """Statistics, order and refits as the configuration says, from the store where they have been computed before.

    Args:
        loaded: the model, whose units are brought into order.
        windows: calibration token ids, shape (windows, length), int64.
        keep: statistics that heuristics ask for.
        reporter: where progress goes; stderr where left out.
        key: what `store_key` must come to, where another process has prepared the same model.

    Raises:
        WorkerError: it comes to something else.
    """
    reporter = reporter or Reporter()
    criterion: Criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    facts: dict[str, Any] = {
        "calibration": config.prune.calibration,
        "ridge": None if config.prune.ridge == "auto" else float(config.prune.ridge),
        "keep": keep,
        "tokens_per_batch": tokens_per_batch(loaded.device),
    }

    def make(on_layer: OnLayer = do_nothing) -> Prepared:
        with reporter.stage(PREPARING, len(windows)) as stage:
            return prepare(
                loaded.model, criterion, windows, source=loaded.stream, on_layer=on_layer, on_progress=stage, **facts
            )

    weights = weights_digest(loaded.model, loaded.stream)
    own = store_key(loaded.model, criterion, windows, {**facts, "keep": sorted(keep)}, weights)
    if key not in (None, own):
        raise WorkerError(
            f"model {loaded.name!r} of a worker on {socket.gethostname()} is not the one that this run has prepared, or"
            " ffgym, a plugin, torch, transformers or the number of threads is another there",
            hint="Give all machines the same model folder and versions, or name a hub model and its revision.",
        )
    if not is_stored(criterion, config.prune.calibration):
        return replace(make(), key=own, weights=weights)
    what = {"model": loaded.description, "settings": settings_of(config, keep, loaded.dtype_name)}
    prepared = opened_or_prepared(own, loaded.model, make, what, reporter.print, loaded.stream, keep)
    return replace(prepared, key=own, weights=weights)


def settings_of(config: RunConfig, keep: frozenset[str], dtype_name: str) -> str:
    """What decides a preparation, as far as it is known before anything is loaded: weights and text by their names.

    Args:
        config: with all options of its plugins.
        keep: statistics that heuristics ask for.
        dtype_name: that the model is loaded in.
    """
    model, data, prune = config.model, config.data, config.prune
    said = [decisive_code(), torch.__version__, transformers.__version__, torch.get_num_threads()]
    said += [model.name, model.revision, dtype_name, choose_device(model.device).type]
    said += [data.calibration, data.calibration_tokens, data.window, data.bos]
    said += [config.criterion.model_dump(), sorted(keep)]
    return json.dumps([*said, prune.calibration, prune.ridge])


def counted_resources(config: RunConfig) -> dict[str, Resource]:
    """The resources that a run counts, by name: those of every table, its budget's, its reward's.

    Raises:
        ConfigError, PluginError, UnknownNameError: as `make_reward`.
    """
    reward = make_reward(config)
    named = reward.resources if "cost" in reward.needs else ()
    return {name: resource_named(name) for name in (*standard_resources(), config.prune.resource, *named)}


def named_table(config: RunConfig, resource: str) -> Path | None:
    """The file that the configuration names for the measurement of a resource; ``None`` where it names none."""
    named = config.prune.latency_table if resource == "latency" else None
    return None if named is None else Path(named).expanduser()


def table_digest(config: RunConfig) -> str | None:
    """Digest of the latency table that the configuration names; ``None`` where it names none.

    Raises:
        ConfigError: the file is none.
    """
    file = named_table(config, "latency")
    return None if file is None else read_table(file).digest


def check_measurements(config: RunConfig) -> None:
    """Refuse resources that cannot be counted, and files of measurements that a run could not use; loads no weights.

    Raises:
        ConfigError: a named file is missing or damaged; also as `counted_resources`.
        BudgetError: it is for another model or context, or latency is to be timed on more tokens than the model takes.
    """
    model, revision = config.model.name, config.model.revision
    for name, resource in counted_resources(config).items():
        if named_table(config, name) is not None:
            costs_in(resource, config, skeleton_of(config_of(model, revision=revision), model))
        elif name == "latency":
            check_context(config.prune.context, context_limit(model, revision=revision))


def costs_in(
    resource: Resource,
    config: RunConfig,
    model: Any,
    *,
    recorded: Path | None = None,
    on_progress: OnStep = do_nothing,
    notify: Notify = do_nothing,
) -> Costs:
    """What a dense model costs in a resource, under a configuration; see `costs_of` for progress, notes and errors.

    Args:
        recorded: folder of a run that is resumed: a measurement in it is used again.
    """
    file = named_table(config, resource.name)
    if recorded is not None and (recorded / f"{resource.name}.json").is_file():
        file = recorded / f"{resource.name}.json"
    return costs_of(resource, model, context=config.prune.context, file=file, on_progress=on_progress, notify=notify)


def make_budget(config: RunConfig, model: Any, costs: Mapping[str, Costs] | None = None) -> Budget:
    """The budget of a run on a dense model; ``costs``, by resource, are computed where left out.

    Raises:
        BudgetError: the sparsity is out of reach.
        ModelError: a stock checkpoint is asked for, which the family does not have, or not with this calibration.
    """
    budget = budget_in(config.prune.resource, config, model, costs)
    budget.check(config.prune.ends[1])
    return budget


def budget_in(resource: str, config: RunConfig, model: Any, costs: Mapping[str, Costs] | None = None) -> Budget:
    """What allocations of a dense model cost in a resource, which may be another than that of the run's budget.

    Raises:
        ModelError: a stock checkpoint is asked for, which the family does not have, or not with this calibration.
    """
    family, prune = family_of(model), config.prune
    if prune.uniform and calibration_class(prune.calibration).affine:
        family.check_stock_biases(model)
    found = costs_in(resource_named(resource), config, model) if costs is None else costs[resource]
    return Budget(
        family.sublayers(model),
        found.tables,
        resource=resource,
        min_units=prune.min_units,
        align=prune.align,
        shapes=family.stock_shapes(model) if prune.uniform else None,
    )


def make_reward(config: RunConfig) -> Reward:
    """The reward of a run, checked against the configuration; loads nothing.

    Raises:
        ConfigError: an option that it refuses, accuracy without tasks, a cost that the budget already fixes, or a
            latency table that nothing reads.
        UnknownNameError: no such reward, task or resource.
    """
    reward: Reward = manager.create("reward", config.reward.name, config.reward.options)
    if "accuracy" in reward.needs:
        if not reward.tasks:
            raise ConfigError(
                f"reward {config.reward.name!r} needs accuracy, but names no tasks to measure it on",
                hint="Name some, e.g. --set 'reward.tasks=[\"arc_easy\"]', or give accuracy no weight."
                if "tasks" in type(reward).Config.model_fields
                else 'Name some in its attribute, e.g. tasks = ("arc_easy",).',
            )
        check_search_tasks(reward.tasks)
    resource_class(config.prune.resource)
    weighed = reward.resources if "cost" in reward.needs else ()
    for resource in weighed:
        resource_class(resource)
        if resource == config.prune.resource:
            raise ConfigError(
                f"reward {config.reward.name!r} weighs {resource}, and the budget is in {resource}: it costs the "
                "same whatever the allocation",
                hint="Weigh another resource "
                f"({', '.join(name for name in manager.names('resource') if name != resource)}), or prune another.",
            )
    if config.prune.latency_table is not None and "latency" not in (config.prune.resource, *weighed):
        raise ConfigError(
            f"prune.latency_table is given, but prune.resource is {config.prune.resource!r}, reward "
            f"{config.reward.name!r} weighs no latency either, and nothing would read it",
            hint="Add --resource latency, or leave the table out.",
        )
    return reward


def build_env(
    config: RunConfig,
    prepared: Prepared,
    windows: torch.Tensor,
    budget: Budget,
    loaded: LoadedModel,
    *,
    costs: Mapping[str, Costs] | None = None,
    executor: Evaluator | None = None,
) -> PruningEnv:
    """The stationary environment of a run.

    Args:
        windows: search split, shape (windows, length), int64.
        loaded: its tokenizer and context serve a reward that needs accuracy.
        costs: what the model costs, by resource; computed where left out.
        executor: has allocations measured; this process measures them where left out.
    """
    reward, model = make_reward(config), prepared.prunable.model
    examples = examples_for(reward, loaded)
    resources = (reward.resources or standard_resources()) if "cost" in reward.needs else ()
    return PruningEnv(
        prepared.prunable,
        reward,
        windows,
        budget,
        sparsity=config.prune.target,
        episode_windows=config.episode_windows,
        reserved=config.final_windows,
        calibrated=calibration_class(config.prune.calibration).in_reward,
        tokens_per_batch=tokens_per_batch(model.device),
        examples=examples,
        prices={resource: budget_in(resource, config, model, costs) for resource in resources},
        executor=executor or evaluator_of(config, prepared, windows, examples),
    )


def evaluator_of(
    config: RunConfig, prepared: Prepared, windows: torch.Tensor, examples: Sequence[EncodedExample]
) -> ModelEvaluator:
    """Measures allocations as the configuration says, in this process."""
    return ModelEvaluator(
        prepared.prunable,
        windows,
        examples=examples,
        calibrated=calibration_class(config.prune.calibration).in_reward,
        tokens_per_batch=tokens_per_batch(prepared.prunable.model.device),
        known=None if prepared.store is None else prepared.store / ADDED_TO,
    )


def examples_for(reward: Reward, loaded: LoadedModel) -> tuple[EncodedExample, ...]:
    """All examples of a reward's tasks as token ids, task after task; none where it needs no accuracy."""
    tasks, limit = reward.tasks if "accuracy" in reward.needs else (), loaded.context_limit
    return tuple(encode(e, loaded.tokenizer, context_limit=limit) for task in tasks for e in search_examples(task))
