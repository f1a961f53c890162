"""Finds plugins by kind and name: the built-ins below, and what installed packages offer in the group ``ffgym``.

Built-ins are strings, imported when asked for, so that listing names never imports torch. Third-party plugins are
loaded one by one, in isolation: one that fails is recorded and stops only a run that asks for what it might provide.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, NamedTuple, overload

import pluggy
from pydantic import ValidationError

from ffgym.config import RunConfig
from ffgym.config_errors import config_error
from ffgym.config_file import changed_settings, settings
from ffgym.errors import ConfigError, FFGymError, PluginError, UnknownNameError
from ffgym.plugins import hookspecs
from ffgym.plugins.bases import Agent, Criterion, Heuristic, Plugin, PluginConfig, Reward
from ffgym.types import JSONDict, PluginRecord
from ffgym.version import __version__

PluginKind = Literal["agent", "criterion", "heuristic", "reward"]

ENVIRONMENT_VARIABLE = "FFGYM_LOAD_PLUGINS"
"""Names of the entry points to load, separated by commas; empty loads none; unset loads all."""

STATISTICS = frozenset({"mean", "square", "second_moment", "gradient", "output_gradient"})
"""What a criterion or a heuristic may need."""

MEASUREMENTS = frozenset({"kl", "reverse_kl", "accuracy", "cost"})
"""What a reward may need beside the losses."""


NAME = re.compile("[a-z0-9][a-z0-9_-]*")
"""What a plugin may be called: names become folders, keys and file names."""


class BuiltIn(NamedTuple):
    """Where a built-in lives (``"module:Class"``), and the line that ``ffgym ls`` prints."""

    target: str
    description: str


BUILTINS: dict[PluginKind, dict[str, BuiltIn]] = {
    "agent": {
        "reinforce": BuiltIn("ffgym.agents.reinforce:Reinforce", "policy gradient over a Gaussian of importances"),
        "pathwise": BuiltIn("ffgym.agents.pathwise:Pathwise", "down the slope of the loss, from backward passes"),
        "ppo": BuiltIn("ffgym.agents.ppo:PPO", "Stable-Baselines3's PPO"),
        "evolution": BuiltIn("ffgym.agents.evolution:Evolution", "mutation, crossover and survival in a population"),
        "cma-es": BuiltIn("ffgym.agents.cma_es:CMAES", "covariance matrix adaptation, by the cmaes package"),
        "bayesian": BuiltIn("ffgym.agents.bayesian:Bayesian", "Gaussian-process surrogate with expected improvement"),
        "evopress": BuiltIn("ffgym.agents.evopress:EvoPress", "level switches with several rounds of selection"),
        "sensitivity": BuiltIn("ffgym.agents.sensitivity:Sensitivity", "each sublayer alone, then the best choice"),
        "random": BuiltIn("ffgym.agents.random_search:RandomSearch", "independent random importances"),
        "one-shot": BuiltIn("ffgym.agents.one_shot:OneShot", "the prior's heuristic, measured as it is; no search"),
    },
    "criterion": {
        "wanda": BuiltIn("ffgym.criteria.wanda:Wanda", "|W| times the norm of the inputs"),
        "magnitude": BuiltIn("ffgym.criteria.magnitude:Magnitude", "|W|: the smallest weights go first"),
        "flap": BuiltIn("ffgym.criteria.flap:Flap", "variance of a channel times its column's squared norm"),
        "obs": BuiltIn("ffgym.criteria.obs:Obs", "error that removing a channel leaves after the best refit"),
        "taylor": BuiltIn("ffgym.criteria.taylor:Taylor", "|W * dL/dW|: the loss change to first order"),
        "random": BuiltIn("ffgym.criteria.random:Random", "a seeded random order, the floor for every criterion"),
    },
    "heuristic": {
        "uniform": BuiltIn("ffgym.heuristics.uniform:Uniform", "every sublayer keeps the same share"),
        "fisher": BuiltIn("ffgym.heuristics.fisher:Fisher", "least loss by second-order estimates after calibration"),
        "mlp-first": BuiltIn("ffgym.heuristics.mlp_first:MlpFirst", "MLPs go first, those at both ends are spared"),
        "skip-ends": BuiltIn("ffgym.heuristics.skip_ends:SkipEnds", "both ends stay whole, the rest is cut alike"),
        "flap": BuiltIn("ffgym.heuristics.flap:Flap", "one global cut through standardised fluctuation scores"),
        "owl": BuiltIn("ffgym.heuristics.owl:Owl", "more outliers among |W| times the inputs' norm, less cut"),
        "alpha": BuiltIn("ffgym.heuristics.alpha:Alpha", "heavier-tailed spectrum of the weight, less cut"),
        "gate-scaling": BuiltIn("ffgym.heuristics.gate_scaling:GateScaling", "loss leans more on the output, less cut"),
    },
    "reward": {
        "perplexity": BuiltIn("ffgym.rewards.perplexity:Perplexity", "dense perplexity over pruned perplexity"),
        "kl": BuiltIn("ffgym.rewards.kl:KL", "exp(-KL): how far the next-token distribution moves from the dense one"),
        "multi-objective": BuiltIn(
            "ffgym.rewards.multi_objective:MultiObjective", "weighted perplexity ratio, task accuracy and saved cost"
        ),
    },
}

_BASES: dict[PluginKind, type[Plugin]] = {
    "agent": Agent,
    "criterion": Criterion,
    "heuristic": Heuristic,
    "reward": Reward,
}
_HOOKS: dict[str, PluginKind] = {
    "ffgym_agents": "agent",
    "ffgym_criteria": "criterion",
    "ffgym_heuristics": "heuristic",
    "ffgym_rewards": "reward",
}
_TABLES: dict[PluginKind, str] = {"agent": "agent", "criterion": "criterion", "heuristic": "prior", "reward": "reward"}


class Package(NamedTuple):
    """The distribution that ships a plugin."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Offer:
    """One class that an installed plugin offers."""

    kind: PluginKind
    cls: type[Plugin]
    package: Package


@dataclass(frozen=True)
class Discovery:
    """What looking through the installed packages brought: the classes that loaded, and a row per entry point."""

    offers: tuple[Offer, ...]
    records: tuple[PluginRecord, ...]


def names(kind: PluginKind) -> dict[str, str]:
    """Every usable name of a kind with its one-line description, built-ins first.

    A name with two owners cannot be used, so it is left out.
    """
    lines = {name: built_in.description for name, built_in in BUILTINS[kind].items()}
    for offer in _discovered().offers:
        if offer.kind == kind:
            lines.setdefault(offer.cls.name, _first_line(offer.cls))
    return {name: line for name, line in lines.items() if len(_owners(kind, name)) == 1}


def records() -> list[PluginRecord]:
    """What ``ffgym plugins`` shows: the built-ins, then one row per entry point, broken and refused ones included."""
    provides: dict[str, list[str]] = {kind: list(table) for kind, table in BUILTINS.items()}
    built_in = PluginRecord("built-in", *_built_in_package(), provides=provides)
    return [built_in, *_discovered().records]


@overload
def get_class(kind: Literal["agent"], name: str) -> type[Agent]: ...
@overload
def get_class(kind: Literal["criterion"], name: str) -> type[Criterion]: ...
@overload
def get_class(kind: Literal["heuristic"], name: str) -> type[Heuristic]: ...
@overload
def get_class(kind: Literal["reward"], name: str) -> type[Reward]: ...
def get_class(kind: PluginKind, name: str) -> type[Plugin]:
    """Find the class behind a name.

    Raises:
        UnknownNameError: nobody provides it; the hint also names plugins that could not be loaded.
        PluginError: two packages provide it.
    """
    owners = _owners(kind, name)
    if len(owners) > 1:
        raise PluginError(
            _conflict(kind, name, owners),
            hint=f"Uninstall one, or load only the plugins you want: {ENVIRONMENT_VARIABLE}=a,b (empty for none).",
        )
    if not owners:
        raise _unknown(kind, name)
    if name in BUILTINS[kind]:
        module, _, attribute = BUILTINS[kind][name].target.partition(":")
        cls: type[Plugin] = getattr(importlib.import_module(module), attribute)
        return cls
    return next(offer.cls for offer in _discovered().offers if (offer.kind, offer.cls.name) == (kind, name))


@overload
def create(kind: Literal["agent"], name: str, options: Mapping[str, Any] | None = None) -> Agent: ...
@overload
def create(kind: Literal["criterion"], name: str, options: Mapping[str, Any] | None = None) -> Criterion: ...
@overload
def create(kind: Literal["heuristic"], name: str, options: Mapping[str, Any] | None = None) -> Heuristic: ...
@overload
def create(kind: Literal["reward"], name: str, options: Mapping[str, Any] | None = None) -> Reward: ...
def create(kind: PluginKind, name: str, options: Mapping[str, Any] | None = None) -> Plugin:
    """Make an instance with validated options.

    Args:
        kind: agent, criterion, heuristic or reward.
        name: a registered name.
        options: the keys of its TOML table beside ``name``, e.g. ``config.criterion.options``.

    Raises:
        ConfigError: an option that the class's ``Config`` refuses; names the table and the key.
        PluginError: two packages provide the name, or the constructor failed.
        UnknownNameError: nobody provides the name.
    """
    cls: type[Plugin] = get_class(kind, name)
    config = _validated(kind, cls, options or {})
    try:
        return cls(config)
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(f"{described(cls)} could not be created: {type(error).__name__}: {error}") from error


def _validated(kind: PluginKind, cls: type[Plugin], options: Mapping[str, Any]) -> PluginConfig:
    try:
        return cls.Config.model_validate(dict(options))
    except ValidationError as error:
        raise config_error(error, cls.Config, _TABLES[kind]) from None
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(f"{described(cls)} could not check its options: {type(error).__name__}: {error}") from error


def with_options(config: RunConfig) -> RunConfig:
    """The same configuration with all options of its plugins spelled out, so that it means the same tomorrow.

    What is stored beside numbers must say what decided them, also after a plugin's default has moved. An option whose
    value is ``None`` is left out: TOML has no null.

    Raises:
        ConfigError, PluginError, UnknownNameError: as `create`.
    """
    tables = {}
    for key, (kind, cls) in _used(config).items():
        table = getattr(config, key)
        options = _validated(kind, cls, table.options).model_dump(mode="json", exclude_none=True)
        tables[key] = type(table)(**{**options, "name": table.name})
    return config.model_copy(update=tables)


def meanings(config: RunConfig) -> dict[str, dict[str, str]]:
    """What the options of a configuration's plugins mean, by table and option."""
    return {key: cls.Config.meanings() for key, (_, cls) in _used(config).items()}


def editions(config: RunConfig) -> dict[str, int]:
    """The edition of the plugin that each table names, where it is not the first."""
    return {key: cls.edition for key, (_, cls) in _used(config).items() if cls.edition != 1}


def _used(config: RunConfig) -> dict[str, tuple[PluginKind, type[Plugin]]]:
    """Kind and class of the plugin that each table names; without ``prior`` where that is none."""
    named: list[tuple[PluginKind, str, str]] = [(kind, key, getattr(config, key).name) for kind, key in _TABLES.items()]
    return {key: (kind, get_class(kind, name)) for kind, key, name in named if (kind, name) != ("heuristic", "none")}


def changed_since(stored: JSONDict, config: RunConfig) -> list[str]:
    """Where a configuration that has all its options differs from `settings` that were stored earlier, one line a key.

    As `changed_settings`: an option that a plugin has learnt since they were stored counts as its default.
    """
    with contextlib.suppress(ValidationError, FFGymError):  # the comparison says what is wrong with them
        stored = settings(with_options(RunConfig.model_validate(stored)))
    return changed_settings(stored, config)


def resolve_agent(config: RunConfig) -> RunConfig:
    """Let a heuristic stand in for an agent: ``agent = flap`` means the one-shot agent with the prior ``flap``.

    The agent table's options become the prior's, and the search is a single episode: there is nothing to learn. A
    configuration that names an agent comes back unchanged.
    """
    name = config.agent.name
    if _owners("agent", name) or not _owners("heuristic", name):
        return config
    inherited = config.prior.options if config.prior.name == name else {}
    prior = type(config.prior)(name=name, **{**inherited, **config.agent.options})
    once = config.search.model_copy(update={"episodes": 1, "episodes_per_update": 1})
    return config.model_copy(update={"agent": type(config.agent)(name="one-shot"), "prior": prior, "search": once})


def check_agent_fits(config: RunConfig) -> None:
    """Refuse what an agent cannot do: fewer episodes than it learns from, a range, one shape for all layers.

    Args:
        config: as `resolve_agent` returns it.

    Raises:
        ConfigError: names the setting and the agent.
        UnknownNameError: nobody provides the agent.
    """
    name, search = config.agent.name, config.search
    agent = create("agent", name, config.agent.options)
    agent.check_updates(agent.update_size(search.episodes_per_update))
    cost = agent.update_cost(search.episodes_per_update)
    if search.episodes < cost:
        slopes = ", its slopes included" if agent.slope_episodes else ""
        lower = " or lower search.episodes_per_update" if agent.update_episodes is None else ""
        raise ConfigError(
            f"search.episodes = {search.episodes} is less than an update of agent {name!r}, which costs {cost}{slopes}",
            hint=f"Raise search.episodes{lower}.",
        )
    if config.prune.uniform and agent.slope_episodes:
        raise ConfigError(
            f"prune.uniform ties all layers to one shape, and agent {name!r} follows slopes, which are of layers that "
            "each have a size of their own",
            hint="Leave --uniform out, or take an agent that needs no slopes, such as reinforce.",
        )
    if config.prune.is_range and not agent.budget_conditioned:
        raise ConfigError(
            f"prune.sparsity = {config.prune.sparsity!r} is a range of budgets, and agent {name!r} proposes the same "
            "at every target",
            hint="Use --agent reinforce, or run one target at a time, e.g. --sparsity 0.2.",
        )


def package_of(plugin: Plugin | type[Plugin]) -> Package:
    """The distribution that ships a plugin, for messages and tags; its top-level module where none is registered."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    module = cls.__module__.partition(".")[0]
    if module == "ffgym":
        return _built_in_package()
    return next((offer.package for offer in _discovered().offers if offer.cls is cls), Package(module, ""))


def described(plugin: Plugin | type[Plugin]) -> str:
    """``"criterion 'magnitude-l2' (package ffgym-magnitude-l2 0.1.0)"``: how messages name a plugin."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    kind = next((kind for kind, base in _BASES.items() if issubclass(cls, base)), "plugin")
    return f"{kind} {getattr(cls, 'name', cls.__qualname__)!r} (package {package_of(cls)})"


def forget() -> None:
    """Look through the installed packages again at the next question, e.g. after one was installed."""
    _discover.cache_clear()


def _discovered() -> Discovery:
    return _discover(os.environ.get(ENVIRONMENT_VARIABLE))


@functools.cache
def _discover(wanted: str | None) -> Discovery:
    """Load every entry point, or those in ``wanted`` (separated by commas)."""
    found = sorted(entry_points(group=hookspecs.GROUP), key=lambda entry: entry.name)
    offers: list[Offer] = []
    rows: list[PluginRecord] = []
    chosen = None if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    for entry in found:
        if chosen is None or entry.name in chosen:
            loaded, row = _load(entry)
            offers.extend(loaded)
            rows.append(row)
    for name in chosen or []:
        if name not in {entry.name for entry in found}:
            there = ", ".join(entry.name for entry in found) or "none"
            failure = f"not installed, but {ENVIRONMENT_VARIABLE} asks for it (entry points that are there: {there})"
            rows.append(PluginRecord(name, package="", version="", provides={}, failure=failure))
    return Discovery(tuple(offers), tuple(_with_conflict(row, offers) for row in rows))


def _load(entry: EntryPoint) -> tuple[list[Offer], PluginRecord]:
    """Import one plugin and ask its hooks; whatever goes wrong becomes the record's failure."""
    package = Package(entry.name, "")
    if entry.dist is not None:  # of a broken installation it knows neither
        package = Package(entry.dist.name or entry.name, entry.dist.version or "")
    offers: list[Offer] = []
    failure = None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to what the user asked for
            offers = [Offer(kind, cls, package) for kind, cls in _ask_hooks(entry)]
    except (Exception, SystemExit) as error:
        failure = f"{type(error).__name__}: {error}"
    provides: dict[str, list[str]] = {}
    for offer in offers:
        provides.setdefault(offer.kind, []).append(offer.cls.name)
    return offers, PluginRecord(entry.name, package.name, package.version, provides, failure)


def _ask_hooks(entry: EntryPoint) -> list[tuple[PluginKind, type[Plugin]]]:
    # A pluggy manager of its own: neither a bad signature nor an exception reaches another plugin.
    pluggy_manager = pluggy.PluginManager(hookspecs.GROUP)
    pluggy_manager.add_hookspecs(hookspecs)
    module = entry.load()
    try:
        pluggy_manager.register(module, name=entry.name)
        pluggy_manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"{reason}; the hooks are {', '.join(_HOOKS)}, and none takes an argument") from error
    implemented = {caller.name for caller in pluggy_manager.get_hookcallers(module) or []}
    if not implemented:
        raise PluginError(f"{entry.value} implements no hook; decorate one of {', '.join(_HOOKS)} with @ffgym.hookimpl")
    offered = []
    for hook, kind in _HOOKS.items():
        answers = getattr(pluggy_manager.hook, hook)()
        if hook in implemented and not answers:  # pluggy drops None
            raise PluginError(f"{hook} returned None, not a list of classes")
        for classes in answers:
            if not isinstance(classes, (list, tuple)):
                raise PluginError(f"{hook} returned {classes!r}, not a list of classes")
            for cls in classes:
                _check_class(hook, kind, cls)
                offered.append((kind, cls))
    return offered


def _check_class(hook: str, kind: PluginKind, cls: Any) -> None:
    """Refuse what is not a complete plugin class, before anybody depends on it."""
    base = _BASES[kind]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{hook} returned {cls!r}, which is not a subclass of ffgym.{base.__name__}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise PluginError(f"{hook} returned {cls.__qualname__}, which does not define {', '.join(missing)}")
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PluginError(
            f"{hook} returned {cls.__qualname__}, whose name is {name!r}, not lower-case letters, digits, '-' and '_'"
        )
    if kind == "heuristic" and name == "none":
        raise PluginError("a heuristic cannot be called 'none': prior.name = none means no prior")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, PluginConfig)):
        raise PluginError(f"{kind} {name!r}: its Config is not a subclass of ffgym.PluginConfig")
    if "name" in cls.Config.model_fields:
        raise PluginError(f"{kind} {name!r}: its Config has an option 'name', and a table's `name` says which plugin")
    needs: Any = getattr(cls, "needs", frozenset())
    if not isinstance(needs, (set, frozenset)):
        raise PluginError(f"{kind} {name!r}: needs is {needs!r}, not a frozenset of names")
    if not (isinstance(cls.edition, int) and cls.edition >= 1):
        raise PluginError(f"{kind} {name!r}: edition is {cls.edition!r}, not a whole number from 1")
    worst: Any = getattr(cls, "worst", 0.0)
    if kind == "reward" and not (isinstance(worst, (int, float)) and math.isfinite(worst)):
        raise PluginError(f"reward {name!r}: worst is {worst!r}, not a finite number")
    known, called = (MEASUREMENTS, "measurements") if kind == "reward" else (STATISTICS, "statistics")
    if not needs <= known:
        raise PluginError(f"{kind} {name!r} needs unknown {called} {sorted(needs - known)}; known: {sorted(known)}")


def _owners(kind: PluginKind, name: str) -> list[str]:
    """Everybody who provides a name."""
    built_in = [f"{_built_in_package()} (built-in)"] if name in BUILTINS[kind] else []
    return built_in + _third_parties(_discovered().offers, kind, name)


def _third_parties(offers: Iterable[Offer], kind: PluginKind, name: str) -> list[str]:
    return [str(offer.package) for offer in offers if (offer.kind, offer.cls.name) == (kind, name)]


def _with_conflict(row: PluginRecord, offers: Iterable[Offer]) -> PluginRecord:
    """Write into a row which of its names another package provides as well."""
    refusals = []
    for kind, table in BUILTINS.items():
        for name in dict.fromkeys(row.provides.get(kind, [])):
            built_in = [f"{_built_in_package()} (built-in)"] if name in table else []
            owners = built_in + _third_parties(offers, kind, name)
            if len(owners) > 1:
                refusals.append(_conflict(kind, name, owners))
    if not refusals:
        return row
    return PluginRecord(row.name, row.package, row.version, row.provides, failure="; ".join(refusals))


def _conflict(kind: PluginKind, name: str, owners: list[str]) -> str:
    return f"{kind} {name!r} has {len(owners)} owners, so it is refused: {' and '.join(owners)}"


def _unknown(kind: PluginKind, name: str) -> UnknownNameError:
    # A heuristic may stand where an agent is asked for, see `resolve_agent`; prior.name = none means no prior.
    also = {"agent": names("heuristic"), "heuristic": ["none"]}
    known = [*names(kind), *also.get(kind, ())]
    error = UnknownNameError("agent or heuristic" if kind == "agent" else kind, name, known)
    broken = [row for row in _discovered().records if row.failure is not None and not row.provides]
    if broken:
        plugins = "; ".join(f"{Package(row.package or row.name, row.version)} ({row.failure})" for row in broken)
        error.hint = f"{error.hint} Plugins that could not be loaded and might provide it: {plugins}."
    return error


def _built_in_package() -> Package:
    return Package("ffgym", __version__)


def _first_line(cls: type[Plugin]) -> str:
    lines = (cls.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""
