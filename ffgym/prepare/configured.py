"""What a run's configuration means once its plugins are known: options spelled out, what an agent can and cannot do."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ffgym.config.tables import PluginTable, RunConfig
from ffgym.config.toml import changed_settings, settings
from ffgym.errors import ConfigError, FFGymError
from ffgym.plugins.bases import Plugin, Reward
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.contracts import update_episodes
from ffgym.plugins.discovery import entries, package_behind
from ffgym.plugins.kinds import KINDS, PluginKind
from ffgym.plugins.manager import create, get_class, is_name, validated
from ffgym.types import JSONDict

if TYPE_CHECKING:
    from ffgym.envs.schedule import Schedule

# Of its target, a sparsity that a cubic ramp has come to: the last update of the paper's 1,000 episodes is below it.
NEARLY = 0.99
ONCE = {"episodes": 1, "episodes_per_update": 1}  # of [search], where nothing is searched
ALL_TABLES = tuple(kind.table for kind in KINDS.values() if kind.table)


def with_options(config: RunConfig, only: Collection[str] = ALL_TABLES) -> RunConfig:
    """The same configuration with all options of its plugins spelled out.

    So what is stored beside results says what decided them, even after a plugin's default has changed. An option whose
    value is ``None`` is left out, because TOML has no null.

    Args:
        only: the tables whose plugins are needed.

    Raises:
        ConfigError, PluginError, UnknownNameError: as `create`; options where the plugin is ``none``.
    """
    for key in only:
        table = getattr(config, key)
        if isinstance(table, PluginTable) and table.options and getattr(table, table.named_by) == "none":
            raise ConfigError(
                f"{key}.{min(table.options)} is an option of a plugin, and {key}.{table.named_by} is 'none'",
                hint="Leave it out, or name the plugin that it belongs to.",
            )
    tables = {}
    for key, (kind, cls) in used_plugins(config, only).items():
        table = getattr(config, key, None)
        if not isinstance(table, PluginTable):
            continue
        options = validated(kind, cls, table.options).model_dump(mode="json", exclude_none=True, by_alias=True)
        tables[key] = type(table)(**options, **{field: getattr(table, field) for field in type(table).model_fields})
    return config.model_copy(update=tables)


def meanings(config: RunConfig, only: Collection[str] = ALL_TABLES) -> dict[str, dict[str, str]]:
    """What the options of a configuration's plugins mean, by table and option, for these tables."""
    return {key: cls.Config.meanings() for key, (_, cls) in used_plugins(config, only).items()}


def editions(config: RunConfig) -> dict[str, int]:
    """The editions of the plugins that a configuration names, by table or key; first editions are left out."""
    used = {key: cls for key, (_, cls) in used_plugins(config).items()}
    reward: Reward = create("reward", config.reward.name, config.reward.options)
    weighed = reward.resources if "cost" in reward.needs else ()
    used |= {f"reward.{resource}": get_class("resource", resource) for resource in weighed}
    return {key: cls.edition for key, cls in used.items() if cls.edition != 1}


def outgrown(stored: Mapping[str, int], config: RunConfig) -> list[str]:
    """How the `editions` of a configuration's plugins differ from stored ones, one line a plugin."""
    now = editions(config)
    return [
        f"the plugin named in [{table}] has changed how it computes since (edition {stored.get(table, 1)} then, "
        f"{now.get(table, 1)} now)"
        for table in sorted({*stored, *now})
        if stored.get(table, 1) != now.get(table, 1)
    ]


def namesakes(config: RunConfig) -> list[str]:
    """Which built-ins a configuration names whose name an entry point has too, one line each; no plugin is imported."""
    built_in = {cls.name: kind for kind, cls in used_plugins(config).values() if cls.name in BUILTINS[kind]}
    return [
        f"{built_in[entry.name]} {entry.name!r} is ffgym's own; the plugin {entry.name!r} of {package_behind(entry)} is"
        " not used for it"
        for entry in entries()
        if entry.name in built_in
    ]


def used_plugins(config: RunConfig, only: Collection[str] = ALL_TABLES) -> dict[str, tuple[PluginKind, type[Plugin]]]:
    """Kind and class of the plugins that these tables and their keys name, where they name one."""
    used: dict[str, tuple[PluginKind, type[Plugin]]] = {}
    for kind, row in KINDS.items():
        if row.table not in only:
            continue
        table = getattr(config, row.table)
        if (name := getattr(table, row.key)) != "none":
            key = row.table if isinstance(table, PluginTable) else f"{row.table}.{row.key}"
            used[key] = kind, get_class(kind, name)
    return used


def changed_since(stored: JSONDict, config: RunConfig) -> list[str]:
    """How a configuration with all its options differs from stored `settings`, one line a key; see `changed_settings`.

    An option that a plugin did not have then counts as its default.
    """
    with contextlib.suppress(ValidationError, FFGymError):  # the comparison shows what is wrong with them
        stored = settings(with_options(RunConfig.model_validate(stored)))
    return changed_settings(stored, config)


def resolve_agent(config: RunConfig) -> RunConfig:
    """Let a heuristic stand in for an agent: ``agent = flap`` means the one-shot agent with the prior ``flap``.

    The agent table's options become the prior's, and the search is a single episode: there is nothing to learn. A
    configuration that names an agent comes back unchanged.
    """
    name = config.agent.name
    if not _is_heuristic(name):
        return config
    inherited = config.prior.options if config.prior.name == name else {}
    prior = type(config.prior)(name=name, **{**inherited, **config.agent.options})
    once = config.search.model_copy(update=ONCE)
    return config.model_copy(update={"agent": type(config.agent)(name="one-shot"), "prior": prior, "search": once})


def _is_heuristic(name: str) -> bool:
    """Whether no agent has this name and a heuristic does; built-ins come first, and nothing is imported for them."""
    if name in BUILTINS["agent"] or name in BUILTINS["heuristic"]:
        return name not in BUILTINS["agent"]
    return not is_name("agent", name) and is_name("heuristic", name)


def schedule_of(config: RunConfig) -> Schedule:
    """The ramps of a run, or its range of budgets."""
    from ffgym.envs.schedule import Schedule  # gymnasium

    table, (low, high) = config.schedule, config.prune.ends
    ramps = table.sparsity_start, table.sparsity, table.fidelity, table.ramp_episodes
    return Schedule(high, config.episode_windows, *ramps, low=low if config.prune.is_range else None)


def check_agent_fits(config: RunConfig) -> None:
    """Refuse what an agent cannot do: too few episodes, also for a ramp, a range of budgets, one shape for all layers.

    Args:
        config: as `resolve_agent` returns it.

    Raises:
        ConfigError: names the setting and the agent.
        PluginError: the agent does not say how many episodes an update has.
        UnknownNameError: nobody provides the agent.
    """
    name, search = config.agent.name, config.search
    agent = create("agent", name, config.agent.options)
    size, cost = update_episodes(agent, search.episodes_per_update)
    agent.check_updates(size)
    if search.episodes < cost:
        slopes = ", its slopes included" if agent.slope_episodes else ""
        lower = " or lower search.episodes_per_update" if agent.update_episodes is None else ""
        raise ConfigError(
            f"search.episodes = {search.episodes} is less than an update of agent {name!r}, which costs "
            f"{cost} episodes{slopes}",
            hint=f"Raise search.episodes{lower}.",
        )
    if config.schedule.ramp_episodes is not None and config.searches:
        _check_ramps_end(config, size)
    if config.prune.uniform and agent.slope_episodes:
        raise ConfigError(
            f"prune.uniform ties all layers to one shape, and agent {name!r} follows slopes, for which each layer "
            "needs a size of its own",
            hint="Leave --uniform out, or take an agent that needs no slopes, such as reinforce.",
        )
    if config.prune.is_range and not agent.budget_conditioned:
        prior = f" with prior {config.prior.name!r}" if not config.searches else ""  # a heuristic was named, not it
        raise ConfigError(
            f"prune.sparsity = {config.prune.sparsity!r} is a range of budgets, and agent {name!r}{prior} proposes "
            "the same at every target",
            hint="Use --agent reinforce, or run one target at a time, e.g. --sparsity 0.2.",
        )


def _check_ramps_end(config: RunConfig, size: int) -> None:
    """Refuse ramps that updates of ``size`` episodes do not come to the end of, if none costs more than its text."""
    ramps = schedule_of(config)
    episodes, spent, last = 0, 0, ramps.stage(0.0)
    while spent < config.search.episodes * ramps.windows:
        last = ramps.stage(0.0, episodes=episodes)
        spent, episodes = spent + size * last.windows, episodes + size
    if last.fidelity < 1 or last.sparsity < NEARLY * ramps.target:
        raise ConfigError(
            f"schedule.ramp_episodes = {ramps.ramp_episodes:,} is too many for a search of at most {episodes:,} "
            f"episodes: its last update would be at sparsity {last.sparsity:.3g} and fidelity {last.fidelity:.3g}",
            hint="Lower it, raise search.episodes, or leave it out: the ramps then take half of the tokens.",
        )
