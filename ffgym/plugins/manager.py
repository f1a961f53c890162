"""Finds plugins by kind and name, and makes them: the built-ins, and what installed packages offer."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ffgym.config.refusals import config_error
from ffgym.errors import FFGymError, PluginError, UnknownNameError
from ffgym.plugins import discovery
from ffgym.plugins.bases import MEASUREMENTS, STATISTICS, Agent, Plugin, PluginConfig
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.discovery import ENVIRONMENT_VARIABLE, OWN, Package, located, providers
from ffgym.plugins.kinds import KINDS, PluginKind, imported
from ffgym.types import PluginRecord

COUNTS = {"slope_episodes": 0, "least_episodes": 1, "update_episodes": 1, "recommendations": 0}
"""Attributes of an agent that are whole numbers, and the least that each may be."""

NEEDS: dict[PluginKind, frozenset[str]] = {"criterion": STATISTICS, "heuristic": STATISTICS, "reward": MEASUREMENTS}
"""What plugins of a kind may ask for."""


def names(kind: PluginKind) -> dict[str, str]:
    """Every usable name of a kind with its one-line description, built-ins first."""
    lines = {name: built_in.description for name, built_in in BUILTINS[kind].items()}
    offers = (offer for plugin in discovery.load() for offer in plugin.offers if offer.kind == kind)
    used = (offer.cls for offer in offers if discovery.clash(offer) is None)
    return lines | {cls.name: (cls.__doc__ or "").strip().partition("\n")[0] for cls in used}


def is_name(kind: PluginKind, name: str) -> bool:
    """Whether somebody provides a name; nothing is imported for a built-in."""
    return name in BUILTINS[kind] or bool(providers(kind, name))


def records() -> list[PluginRecord]:
    """What ``ffgym plugins`` shows: the built-ins, then one row per entry point, broken and refused ones included."""
    provides: dict[str, list[str]] = {kind: list(table) for kind, table in BUILTINS.items()}
    built_in = PluginRecord("built-in", *OWN, provides=provides)
    return [built_in, *discovery.records()]


def traceback_of(name: str) -> str:
    """Where the entry points of a name failed while they were loaded, as Python prints it."""
    plugins = discovery.load(name=name)
    if not plugins:
        raise UnknownNameError("plugin", name, {entry.name for entry in discovery.entries()})
    failures = ["".join(traceback.format_exception(plugin.error)) for plugin in plugins if plugin.error is not None]
    return "\n".join(failures) or f"{name} was loaded without a failure"


def get_class(kind: PluginKind, name: str) -> Any:
    """Find the class behind a name.

    Raises:
        UnknownNameError: nobody provides it; the hint also names plugins that could not be loaded.
        PluginError: two packages provide it.
    """
    if name in BUILTINS[kind]:
        return imported(BUILTINS[kind][name].target)
    offers = providers(kind, name)
    if len(offers) > 1:
        raise PluginError(
            f"{len(offers)} installed packages provide {kind} {name!r}, so none of them is used: "
            + " and ".join(str(offer.package) for offer in offers),
            hint=f"Uninstall one, or load only the plugins you want: {ENVIRONMENT_VARIABLE}=a,b (empty for none).",
        )
    if not offers:
        raise _unknown(kind, name)
    return offers[0].cls


def create(kind: PluginKind, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make an instance with validated options.

    Args:
        options: the keys of its TOML table beside ``name``, e.g. ``config.criterion.options``.

    Raises:
        ConfigError: an option that the class's ``Config`` refuses; names the table and the key.
        PluginError: two packages provide the name, the constructor failed, or it needs what nobody measures.
        UnknownNameError: nobody provides the name.
    """
    cls = get_class(kind, name)
    config = validated(kind, cls, options or {})
    try:
        plugin = cls(config)
        if isinstance(plugin, Agent):
            _check_counts(plugin)
        if kind in NEEDS:
            _check_needs(plugin, NEEDS[kind])
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(f"{described(cls)} could not be created: {located(error, cls)}") from error
    return plugin


def _check_counts(agent: Agent) -> None:
    """Refuse impossible numbers, which a search would take for its size and its cost."""
    for attribute, least in COUNTS.items():
        value = getattr(agent, attribute)
        if (attribute, value) != ("update_episodes", None) and not (isinstance(value, int) and value >= least):
            raise PluginError(f"{described(agent)}: {attribute} is {value!r}, not a whole number from {least}")


def _check_needs(plugin: Any, known: frozenset[str]) -> None:
    """Refuse needs of other names, which nobody would measure, and text, which would count letter by letter."""
    if not (isinstance(plugin.needs, set | frozenset) and plugin.needs <= known):
        raise PluginError(
            f"{described(plugin)}: needs is {plugin.needs!r}, not a set of any of {', '.join(sorted(known))}",
            hint=f'For one of them: needs = frozenset({{"{min(known)}"}}).',
        )


def validated(kind: PluginKind, cls: type[Plugin], options: Mapping[str, Any]) -> PluginConfig:
    """Check the options of a plugin; errors as in `create`."""
    try:
        return cls.Config.model_validate(dict(options))
    except ValidationError as error:
        raise config_error(error, cls.Config, KINDS[kind].table or kind) from None
    except FFGymError:
        raise
    except Exception as error:
        raise PluginError(f"{described(cls)} could not check its options: {located(error, cls)}") from error


def package_of(plugin: Plugin | type[Plugin]) -> Package:
    """The distribution that ships a plugin, for messages and tags; its top-level module where none is registered."""
    if is_built_in(plugin):
        return OWN
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return discovery.package_that_offers(cls) or Package(cls.__module__.partition(".")[0], "")


def is_built_in(plugin: Plugin | type[Plugin]) -> bool:
    """Whether it is ffgym's own."""
    return plugin.__module__.partition(".")[0] == OWN.name


def described(plugin: Plugin | type[Plugin]) -> str:
    """``"criterion 'output-energy' (package ffgym-output-energy 0.1.0)"``: how messages name a plugin."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return f"{getattr(cls, 'kind', 'plugin')} {getattr(cls, 'name', cls.__qualname__)!r} (package {package_of(cls)})"


def _unknown(kind: PluginKind, name: str) -> UnknownNameError:
    # A heuristic may take an agent's place, see `resolve_agent`; a prior and a recovery may be none.
    also = {"agent": names("heuristic"), "heuristic": ["none"], "recovery": ["none"]}
    known = [*names(kind), *also.get(kind, ())]
    error = UnknownNameError("agent or heuristic" if kind == "agent" else kind, name, known)
    error.hint = with_plugins(str(error.hint), name)
    if kind == "calibration" and not discovery.NAME.fullmatch(name):  # a text's name
        error.hint = f"The text for it is another key: --set data.calibration={name}. {error.hint}"
    return error


def with_plugins(hint: str, name: str) -> str:
    """A hint for a name that was not found, with what installed plugins have to do with it."""
    rows = discovery.records()
    broken = [row for row in rows if row.failure is not None and not row.provides]
    for own in (row for row in rows if row.name == name):
        if own in broken:
            see = f"`ffgym plugins --traceback {name}` shows where."
            return f"The plugin of this name could not be loaded: {own.failure}. {see}"
        provided = ", ".join(f"{kind} {each!r}" for kind, names in own.provides.items() for each in names)
        failure = f" ({own.failure})" if own.failure else ""
        return f"The plugin of this name provides {provided or 'nothing'}{failure}. {hint}"
    if not broken:
        return hint
    plugins = "; ".join(f"{Package(row.package or row.name, row.version)} ({row.failure})" for row in broken)
    return f"{hint} Plugins that could not be loaded and might provide it: {plugins}."
