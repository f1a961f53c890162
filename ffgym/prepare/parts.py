"""From plain data to an environment: what ``gymnasium.make("ffgym/Pruning-v0", ...)`` calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ffgym.config.mixture import Corpora, shares
from ffgym.config.tables import DataTable, RunConfig, WorkersTable
from ffgym.config.toml import load_config
from ffgym.costs.resource import (
    Costs,
    Notify,
    OnProgress,
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
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import ConfigError, UnknownNameError, WorkerError
from ffgym.evaluation.evaluator import ModelEvaluator
from ffgym.execute.base import Executor
from ffgym.models.families import family_of
from ffgym.models.loading import LoadedModel, load
from ffgym.models.placement import choose_device, tokens_per_batch
from ffgym.plugins import manager
from ffgym.plugins.bases import Reward
from ffgym.plugins.built_ins import BUILTINS
from ffgym.prepare.calibrations import calibration_class
from ffgym.prepare.paths import OnLayer, Prepared, prepare
from ffgym.prepare.planning import plan_of
from ffgym.prepare.store import decisive_code, is_stored, opened_or_prepared, store_key
from ffgym.pruning.budget import Budget
from ffgym.report.layout import counted
from ffgym.report.progress import Reporter

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster

LOADING = "load model and text"
PREPARING = "collect statistics, order and factorise"
CHECKED_WINDOW = 128
CHECKED_RIDGE = 0.01


def load_parts(config: RunConfig) -> tuple[LoadedModel, Splits]:
    """Load the model and cut the three splits.

    Raises:
        FitError: preparing it needs more memory than there is.
        ConfigError: it is to be streamed, and something needs it in memory.
        DataError, UnknownNameError: text that is not there.
    """
    model, plan = config.model, plan_of(config)
    plan.check()
    check_texts(config.data)
    loaded = load(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        device=model.device,
        streamed=plan.load.streamed,
    )
    return loaded, cut_splits(config, loaded)


def check_texts(data: DataTable) -> None:
    """Refuse corpora that are not there, before a model is loaded or fetched; errors as in `check_text`."""
    for role in ROLES:
        for name in shares(getattr(data, role)):
            check_text(name)


def splits_of(data: DataTable, tokenizer: Any, *, context_limit: int) -> Splits:
    """The three splits that a table ``[data]`` describes; errors as in `make_splits`."""
    corpora: dict[Role, Corpora] = {role: getattr(data, role) for role in ROLES}
    tokens: dict[Role, int] = {role: getattr(data, f"{role}_tokens") for role in ROLES}
    return make_splits(corpora, tokens, data.window, tokenizer, context_limit=context_limit)


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
    criterion = manager.create("criterion", config.criterion.name, config.criterion.options)
    facts: dict[str, Any] = {
        "calibration": config.prune.calibration,
        "ridge": None if config.prune.ridge == "auto" else float(config.prune.ridge),
        "keep": keep,
        "tokens_per_batch": tokens_per_batch(loaded.device),
    }

    def make(on_layer: OnLayer | None = None) -> Prepared:
        with reporter.stage(PREPARING, len(windows)) as stage:
            return prepare(
                loaded.model, criterion, windows, source=loaded.stream, on_layer=on_layer, on_progress=stage, **facts
            )

    own = store_key(loaded.model, criterion, windows, {**facts, "keep": sorted(keep)}, loaded.stream)
    if key not in (None, own):
        raise WorkerError(
            f"model {loaded.name!r} of a worker on {socket.gethostname()} is not the one that this run has prepared, or"
            " ffgym, torch, transformers or the number of threads is another there",
            hint="Give all machines the same model folder and versions, or name a hub model and its revision.",
        )
    if not is_stored(criterion, config.prune.calibration):
        return replace(make(), key=own)
    what = {"model": loaded.description, "settings": settings_of(config, keep, loaded.dtype_name)}
    prepared = opened_or_prepared(own, loaded.model, make, what, reporter.print, loaded.stream, keep)
    return replace(prepared, key=own)


def settings_of(config: RunConfig, keep: frozenset[str], dtype_name: str) -> str:
    """What decides a preparation, as far as it is known before anything is loaded: weights and text by their names.

    Args:
        config: with all options of its plugins.
        keep: statistics that heuristics ask for.
        dtype_name: that the model is loaded in.
    """
    model, data, prune = config.model, config.data, config.prune
    said = [decisive_code(), torch.__version__, torch.get_num_threads(), model.name, model.revision, dtype_name]
    said += [data.calibration, data.calibration_tokens, data.window, config.criterion.model_dump(), sorted(keep)]
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
    named = getattr(config.prune, resource_class(resource).table_key, None)
    return None if named is None else Path(named)


def table_digest(config: RunConfig) -> str | None:
    """Digest of the measurement that the configuration names a file for; ``None`` where it names none.

    Raises:
        ConfigError: the file holds no such thing.
    """
    files = ((resource, named_table(config, name)) for name, resource in counted_resources(config).items())
    return next((resource.digest_of(file) for resource, file in files if file is not None), None)


def costs_in(
    resource: Resource,
    config: RunConfig,
    model: Any,
    *,
    recorded: Path | None = None,
    on_progress: OnProgress | None = None,
    notify: Notify | None = None,
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
    reward = manager.create("reward", config.reward.name, config.reward.options)
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
                hint=f"Weigh another resource ({', '.join(manager.names('resource').keys() - {resource})}), or "
                "prune another.",
            )
    for name in BUILTINS["resource"]:
        if name not in (config.prune.resource, *weighed) and named_table(config, name) is not None:
            raise ConfigError(
                f"prune.{resource_class(name).table_key} is given, but prune.resource is {config.prune.resource!r}, "
                f"reward {config.reward.name!r} weighs no {name} either, and nothing would read it",
                hint=f"Add --resource {name}, or leave the table out.",
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
    executor: Executor | None = None,
    on_close: Callable[[], None] | None = None,
) -> PruningEnv:
    """The stationary environment of a run.

    Args:
        windows: search split, shape (windows, length), int64.
        loaded: its tokenizer and context serve a reward that needs accuracy.
        costs: what the model costs, by resource; computed where left out.
        executor: has allocations measured; this process measures them where left out.
    """
    reward, model = make_reward(config), prepared.prunable.model
    examples = _examples(reward, loaded)
    resources = (reward.resources or standard_resources()) if "cost" in reward.needs else ()
    return PruningEnv(
        prepared.prunable,
        reward,
        windows,
        budget,
        sparsity=config.prune.target,
        episode_windows=-(-config.search.episode_tokens // config.data.window),
        reserved=config.search.final_tokens // config.data.window,
        calibrated=calibration_class(config.prune.calibration).in_reward,
        tokens_per_batch=tokens_per_batch(model.device),
        examples=examples,
        prices={resource: budget_in(resource, config, model, costs) for resource in resources},
        executor=executor or _evaluator(config, prepared, windows, examples),
        on_close=on_close,
    )


def _evaluator(
    config: RunConfig, prepared: Prepared, windows: torch.Tensor, examples: Sequence[EncodedExample]
) -> ModelEvaluator:
    return ModelEvaluator(
        prepared.prunable,
        windows,
        examples=examples,
        calibrated=calibration_class(config.prune.calibration).in_reward,
        tokens_per_batch=tokens_per_batch(prepared.prunable.model.device),
        known=None if prepared.store is None else prepared.store / ADDED_TO,
    )


@dataclass(frozen=True)
class EvaluatorMaker:
    """How a worker makes its evaluator: it is sent these values and loads the model by itself.

    Attributes:
        config: the run, with the dtype that the model was loaded in.
        calibration: calibration token ids, shape (windows, length), int64.
        windows: search token ids, the same.
        keep: statistics that were kept for heuristics.
        store: the prepared model; ``None`` where it is not stored and every worker prepares its own.
        key: of what this run has prepared.
        streamed: whether layers stay in the checkpoint until they are needed.
    """

    config: RunConfig
    calibration: torch.Tensor
    windows: torch.Tensor
    examples: tuple[EncodedExample, ...]
    keep: frozenset[str]
    store: Path | None
    key: str
    streamed: bool = False

    def __call__(self) -> ModelEvaluator:
        """Load the model, open the store, make the evaluator; raises ``WorkerError`` where they are not the run's."""
        if self.store is not None and not self.store.is_dir():
            raise WorkerError(
                f"a worker on {socket.gethostname()} does not see the prepared model {self.store}",
                hint="Set FFGYM_CACHE to a folder that all machines share, or FFGYM_CACHE_SIZE=0 to prepare on each.",
            )
        table = self.config.model
        loaded = load(
            table.name, revision=table.revision, dtype=table.dtype, device=table.device, streamed=self.streamed
        )
        nobody = Reporter(Console(quiet=True))
        prepared = prepare_model(self.config, loaded, self.calibration, keep=self.keep, reporter=nobody, key=self.key)
        return self.on(prepared)

    def on(self, prepared: Prepared) -> ModelEvaluator:
        """The evaluator of a prepared model."""
        return _evaluator(self.config, prepared, self.windows, self.examples)


def shared_executor(
    cluster: Cluster,
    config: RunConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    splits: Splits,
    keep: frozenset[str] = frozenset(),
) -> Executor:
    """An executor that shares measurements out among the workers of a cluster, who measure as this process does.

    Args:
        keep: as for `prepare_model`.
    """
    table = config.model.model_copy(update={"dtype": loaded.dtype_name})  # another machine's "auto" may be another
    maker = EvaluatorMaker(
        config.model_copy(update={"model": table}),
        splits.calibration.windows,
        splits.search.windows,
        tuple(_examples(make_reward(config), loaded)),
        keep,
        prepared.store,
        prepared.key,
        loaded.stream is not None,
    )
    return cluster.executor(maker, maker.on(prepared), prepared.prunable.dense_units)


def report_idle_workers(
    episodes: int, workers: int, notify: Callable[[str], None], sloped_windows: int | None = None
) -> None:
    """Tell the user if an update has fewer parts to share out than there are workers.

    Args:
        episodes: of an update.
        workers: how many there are.
        notify: is told.
        sloped_windows: of an episode whose slopes are measured, which is an update by itself and is shared out window
            by window; ``None`` for an agent that asks for none.
    """
    if sloped_windows is None:
        parts, when, update = episodes, "", f"an update is {counted(episodes, 'episode')}"
    else:
        parts, when = sloped_windows, "while slopes are followed, "
        update = f"an update is one episode of {counted(sloped_windows, 'window')}"
    if parts < workers:
        have = "has" if workers - parts == 1 else "have"
        notify(f"{when}{workers - parts} of {workers} workers {have} nothing to do: {update}")


@contextmanager
def cluster_of(table: WorkersTable, device: str, notify: Callable[[str], None]) -> Iterator[Cluster | None]:
    """The workers that a table asks for, within the block; ``None`` where this process works alone.

    Args:
        table: how many, and where.

    Raises:
        ConfigError: more than one worker on one and the same GPU.
        WorkerError: see `connected`.
    """
    if table.count == 1:
        yield None
        return
    if ":" in device:
        raise ConfigError(
            f"model.device = {device!r} is one device, and {table.count} workers need one each",
            hint="Set model.device to auto or cuda: Ray gives every worker its own.",
        )
    from ffgym.execute.ray import Workers, connected

    is_on_gpu = choose_device(device).type == "cuda"
    gpus = int(is_on_gpu) if table.gpus == "auto" else table.gpus
    with connected(Workers(table.count, table.ray_address, gpus, torch.get_num_threads()), notify) as cluster:
        yield cluster


def make_schedule(config: RunConfig, env: PruningEnv) -> Schedule:
    """The ramps of a run."""
    table = config.schedule
    low, high = config.prune.ends
    return Schedule(
        target=high,
        windows=env.episode_windows,
        start=table.sparsity_start,
        sparsity=table.sparsity,
        fidelity=table.fidelity,
        ramp_episodes=table.ramp_episodes,
        low=low if config.prune.is_range else None,
    )


def _examples(reward: Reward, loaded: LoadedModel) -> Sequence[EncodedExample]:
    return task_examples(reward.tasks, loaded) if "accuracy" in reward.needs else ()


def task_examples(tasks: Sequence[str], loaded: LoadedModel) -> list[EncodedExample]:
    """All examples of some tasks that a search may be rewarded on, as token ids, task after task."""
    limit = loaded.context_limit
    return [encode(e, loaded.tokenizer, context_limit=limit) for task in tasks for e in search_examples(task)]


def make_pruning_env(
    config: RunConfig | dict[str, Any] | None = None,
    *,
    render_mode: str | None = None,
    num_workers: int | None = None,
    **tables: Any,
) -> PruningEnv:
    """Build the environment from plain data.

    Args:
        config: a ``RunConfig`` or the same as nested dicts; defaults where left out.
        render_mode: ``"rgb_array"``, or ``None`` for no pictures.
        num_workers: processes that measure, in place of ``workers.count``; they end when the environment is closed.
        tables: tables of the configuration, e.g. ``prune={"sparsity": 0.3}``; not together with a ``RunConfig``.

    Raises:
        FFGymError: an unknown table, key, plugin or render mode, an impossible value, a model or text that does not
            load, or too little room for the workers.
    """
    return _pruning_env(_resolved(config, tables, num_workers), 1, render_mode)


def _pruning_env(config: RunConfig, episodes: int, render_mode: str | None) -> PruningEnv:
    """The environment of a configuration, for steps of this many episodes."""
    if render_mode not in (None, *(modes := PruningEnv.metadata["render_modes"])):
        raise UnknownNameError("render mode", str(render_mode), modes)
    make_reward(config)
    reporter = Reporter()
    report_idle_workers(episodes, config.workers.count, reporter.print)
    closing = ExitStack()
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(config.workers, config.model.device, reporter.print))
        with reporter.stage(LOADING, 1):
            loaded, splits = load_parts(config)
        budget = make_budget(config, loaded.model)
        prepared = prepare_model(config, loaded, splits.calibration.windows, reporter=reporter)
        executor = None
        if cluster is not None:
            executor = shared_executor(cluster, config, loaded, prepared, splits)
        env = build_env(
            config,
            prepared,
            splits.search.windows,
            budget,
            loaded,
            executor=executor,
            on_close=closing.close,
        )
        closing.push(stack.pop_all())
    env.render_mode = render_mode
    return env


def make_pruning_vector_env(
    num_envs: int,
    config: RunConfig | dict[str, Any] | None = None,
    *,
    render_mode: str | None = None,
    num_workers: int | None = None,
    **tables: Any,
) -> PruningVectorEnv:
    """Build the vector environment: ``num_envs`` episodes a step, measured on the same text.

    What ``gymnasium.make_vec("ffgym/Pruning-v0", ...)`` calls. Its token budget is that of a run, ``search.episodes``
    full episodes: ramps follow it, ``tokens_left`` counts it, and nothing ends when it is spent.
    The arguments and errors are those of `make_pruning_env`; workers share the episodes of a step.
    """
    config = _resolved(config, tables, num_workers)
    env = _pruning_env(config, num_envs, render_mode)
    budget = config.search.episodes * env.episode_windows * env.window_tokens
    return PruningVectorEnv(env, make_schedule(config, env), num_envs=num_envs, token_budget=budget)


def _resolved(config: RunConfig | dict[str, Any] | None, tables: dict[str, Any], workers: int | None) -> RunConfig:
    if isinstance(config, RunConfig) and tables:
        raise ConfigError(
            f"config is a complete RunConfig already, and {', '.join(tables)} came beside it",
            hint="Give load_config() all tables, or leave config out and give them here.",
        )
    tables = {**(config.model_dump() if isinstance(config, RunConfig) else config or {}), **tables}
    if workers is not None and isinstance(given := tables.get("workers", {}), dict):
        tables["workers"] = {**given, "count": workers}
    return load_config(**tables)


def shrunk(config: RunConfig) -> RunConfig:
    """The same run on a few short windows, for checks of the interface that do not look at the numbers.

    Windows have at most 128 tokens: two for statistics, two to search on, one per episode. A mixture is reduced to its
    first corpus. The ridge strength is a number, because choosing it takes most of the time.
    """
    plain = config.model_dump()
    window = min(config.data.window, CHECKED_WINDOW)
    plain["data"] |= {"window": window, "report_tokens": window}
    plain["data"] |= {"calibration_tokens": 2 * window, "search_tokens": 2 * window}
    plain["data"] |= {role: next(iter(shares(getattr(config.data, role)))) for role in ROLES}
    plain["search"] |= {"episode_tokens": window, "final_tokens": window}
    if config.prune.ridge == "auto":
        plain["prune"] |= {"ridge": CHECKED_RIDGE}
    return RunConfig.model_validate(plain)
