"""What installed packages offer in the entry point group ``ffgym``, loaded one by one and checked.

One that fails is recorded and stops only a run that asks for what it might provide.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import pluggy

from ffgym.config.tables import table_model
from ffgym.errors import PluginError
from ffgym.plugins import hookspecs
from ffgym.plugins.bases import Plugin, PluginConfig
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.kinds import HOOKS, KINDS, PluginKind, imported
from ffgym.types import PluginRecord
from ffgym.version import __version__

ENVIRONMENT_VARIABLE = "FFGYM_LOAD_PLUGINS"
"""Names of the entry points to load, separated by commas; empty loads none; unset loads all."""

STATISTICS = frozenset({"mean", "square", "second_moment", "gradient", "output_gradient"})
"""What a criterion or a heuristic may need."""

MEASUREMENTS = frozenset({"kl", "reverse_kl", "accuracy", "cost"})
"""What a reward may need beside the losses."""

NAME = re.compile("[a-z0-9][a-z0-9_-]*")
"""What a plugin may be called: names become folders, keys and file names."""


class Package(NamedTuple):
    """The distribution that ships a plugin."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def built_in_package() -> Package:
    """ffgym itself."""
    return Package("ffgym", __version__)


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


def discovered() -> Discovery:
    """What the installed packages offer; they are looked through once."""
    return _discover(os.environ.get(ENVIRONMENT_VARIABLE))


def forget() -> None:
    """Look through the installed packages again at the next question, e.g. after one was installed."""
    _discover.cache_clear()


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
            failure = f"not installed, but {ENVIRONMENT_VARIABLE} asks for it (installed entry points: {there})"
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
        raise PluginError(f"{reason}; the hooks are {', '.join(HOOKS)}, and none takes an argument") from error
    implemented = {caller.name for caller in pluggy_manager.get_hookcallers(module) or []}
    if not implemented:
        raise PluginError(f"{entry.value} implements no hook; decorate one of {', '.join(HOOKS)} with @ffgym.hookimpl")
    offered = []
    for hook, kind in HOOKS.items():
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
    base: type[Plugin] = imported(KINDS[kind].base)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{hook} returned {cls!r}, which is not a subclass of ffgym.{base.__name__}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise PluginError(f"{hook} returned {cls.__qualname__}, which does not define {', '.join(missing)}")
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PluginError(
            f"{hook} returned {cls.__qualname__}, whose name is {name!r}, not lower-case letters, digits, '-' and '_'"
        )
    table = KINDS[kind].table
    keys = table_model(table).model_fields if table else {}
    if kind in ("heuristic", "recovery") and name == "none":
        raise PluginError(f"a {kind} cannot be called 'none': it means none in the table [{table}]")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, PluginConfig)):
        raise PluginError(f"{kind} {name!r}: its Config is not a subclass of ffgym.PluginConfig")
    if taken := sorted(cls.Config.model_fields.keys() & {"name", *keys}):
        raise PluginError(f"{kind} {name!r}: its Config has an option {taken[0]!r}, a key that its table has already")
    if not (isinstance(cls.edition, int) and cls.edition >= 1):
        raise PluginError(f"{kind} {name!r}: edition is {cls.edition!r}, not a whole number from 1")
    check_needs(kind, name, cls)


def check_needs(kind: PluginKind, name: str, plugin: Plugin | type[Plugin]) -> None:
    """Hold ``needs``, and a reward's ``worst``, to their types: of a class, or of an instance that has set them itself.

    Raises:
        PluginError: names that are no set, or that nobody measures; a worst reward that is no finite number.
    """
    needs: Any = getattr(plugin, "needs", frozenset())
    if not isinstance(needs, (set, frozenset)):
        raise PluginError(f"{kind} {name!r}: needs is {needs!r}, not a frozenset of names")
    worst: Any = getattr(plugin, "worst", 0.0)
    if kind == "reward" and not (isinstance(worst, (int, float)) and math.isfinite(worst)):
        raise PluginError(f"reward {name!r}: worst is {worst!r}, not a finite number")
    known, called = (MEASUREMENTS, "measurements") if kind == "reward" else (STATISTICS, "statistics")
    if not needs <= known:
        raise PluginError(f"{kind} {name!r} needs unknown {called} {sorted(needs - known)}; known: {sorted(known)}")


def owners(kind: PluginKind, name: str) -> list[str]:
    """Everybody who provides a name."""
    built_in = [f"{built_in_package()} (built-in)"] if name in BUILTINS[kind] else []
    return built_in + _third_parties(discovered().offers, kind, name)


def _third_parties(offers: Iterable[Offer], kind: PluginKind, name: str) -> list[str]:
    return [str(offer.package) for offer in offers if (offer.kind, offer.cls.name) == (kind, name)]


def _with_conflict(row: PluginRecord, offers: Iterable[Offer]) -> PluginRecord:
    """Write into a row which of its names another package provides as well."""
    refusals = []
    for kind, table in BUILTINS.items():
        for name in dict.fromkeys(row.provides.get(kind, [])):
            built_in = [f"{built_in_package()} (built-in)"] if name in table else []
            claims = built_in + _third_parties(offers, kind, name)
            if len(claims) > 1:
                refusals.append(conflict(kind, name, claims))
    if not refusals:
        return row
    return PluginRecord(row.name, row.package, row.version, row.provides, failure="; ".join(refusals))


def conflict(kind: PluginKind, name: str, claims: list[str]) -> str:
    """Say that several packages provide one name."""
    return f"{kind} {name!r} has {len(claims)} owners, so it is refused: {' and '.join(claims)}"
