"""What installed packages offer in the entry point group ``ffgym``, loaded one by one when needed, and checked.

A failure is recorded. It only stops a run that needs something that the failed plugin might provide.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import pluggy

from ffgym.errors import PluginError, first_line
from ffgym.plugins import hookspecs
from ffgym.plugins.bases import Plugin
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.kinds import HOOKS, KINDS, PluginKind, imported
from ffgym.types import PluginRecord
from ffgym.version import __version__

ENVIRONMENT_VARIABLE = "FFGYM_LOAD_PLUGINS"
"""Names of the entry points to load, separated by commas; empty loads none; unset loads all."""

SLOW_SECONDS = 2.0
"""A plugin that takes longer to import is named."""

SLOW_BASES = ("ffgym.models", "ffgym.pruning.calibration")
"""Modules of base classes that need torch or transformers: a plugin that is the first to import one is not named."""

NAME = re.compile("[a-z0-9][a-z0-9_-]*")
"""What a plugin may be called: names become folders, keys and file names."""


class Package(NamedTuple):
    """The distribution that ships a plugin."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


OWN = Package("ffgym", __version__)


@dataclass(frozen=True)
class Offer:
    """One class that an installed plugin offers."""

    kind: PluginKind
    cls: type[Plugin]
    package: Package


@dataclass(frozen=True)
class Loaded:
    """An entry point that was imported and asked: what it offers, or why that failed."""

    package: Package
    offers: tuple[Offer, ...] = ()
    error: BaseException | None = None


_loaded: dict[EntryPoint, Loaded] = {}  # what was imported so far


def entries() -> list[EntryPoint]:
    """The entry points that may be loaded, in the order of their names."""
    wanted = _wanted()
    return [entry for entry in _found() if wanted is None or entry.name in wanted]


def package_behind(entry: EntryPoint) -> Package:
    """The distribution of an entry point."""
    if entry.dist is None:
        return Package(entry.name, "")
    return Package(entry.dist.name or entry.name, entry.dist.version or "")  # a broken installation has neither


def load(*, name: str | None = None) -> list[Loaded]:
    """Import the entry points of this name, or all of them; each once."""
    chosen = [entry for entry in entries() if name in (None, entry.name)]
    for entry in chosen:
        if entry not in _loaded:
            _loaded[entry] = _load(entry)
    return [_loaded[entry] for entry in chosen]


def package_that_offers(cls: type[Plugin]) -> Package | None:
    """The distribution of a class that was loaded; ``None`` for any other class."""
    offers = (offer for plugin in _loaded.values() for offer in plugin.offers)
    return next((offer.package for offer in offers if offer.cls is cls), None)


def forget() -> None:
    """Look through the installed packages again next time, e.g. after one was installed."""
    _found.cache_clear()
    _loaded.clear()


@functools.cache
def _found() -> list[EntryPoint]:
    return sorted(entry_points(group=hookspecs.GROUP), key=lambda entry: entry.name)


def _wanted() -> list[str] | None:
    names = os.environ.get(ENVIRONMENT_VARIABLE)
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


def providers(kind: PluginKind, name: str) -> list[Offer]:
    """Who provides a name: the entry points of that name, or else all that offer it.

    So a plugin whose entry point has the same name is found without importing any other.
    """

    def offered(loaded: Iterable[Loaded]) -> list[Offer]:
        return [offer for plugin in loaded for offer in plugin.offers if (offer.kind, offer.cls.name) == (kind, name)]

    return offered(load(name=name)) or offered(load())


def records() -> list[PluginRecord]:
    """A row for every entry point, broken and refused ones included."""
    rows = [_record(entry, plugin) for entry, plugin in zip(entries(), load(), strict=True)]
    there = sorted({entry.name for entry in _found()})
    known = ", ".join(there) or "none"
    failure = f"not installed, but {ENVIRONMENT_VARIABLE} asks for it (installed entry points: {known})"
    missing = [name for name in _wanted() or () if name not in there]
    return rows + [PluginRecord(name, package="", version="", provides={}, failure=failure) for name in missing]


def _record(entry: EntryPoint, plugin: Loaded) -> PluginRecord:
    provides: dict[str, list[str]] = {}
    for offer in plugin.offers:
        provides.setdefault(offer.kind, []).append(offer.cls.name)
    failure = "; ".join(filter(None, map(clash, plugin.offers))) or None
    if plugin.error is not None:
        failure = f"{type(plugin.error).__name__}: {first_line(plugin.error)}"
        if not isinstance(plugin.error, PluginError | SyntaxError):  # these say where
            failure += f" ({place_of(plugin.error, entry.module)})"
    return PluginRecord(entry.name, *plugin.package, provides, failure)


def clash(offer: Offer) -> str | None:
    """Why an offer is not used: a built-in has its name; ``None`` if it is used."""
    if offer.cls.name not in BUILTINS[offer.kind]:
        return None
    return f"{offer.kind} {offer.cls.name!r} is a built-in, which is used; the plugin has to be renamed"


def place_of(error: BaseException, package: str) -> str:
    """Where something failed, ``"/path/my_plugin.py, line 12"``: the last line of a module's package that was running.

    Where none was, because ffgym refuses what the package returned, the file; of a file that could not be imported, the
    last line of all.
    """
    calls = [call for call in traceback.walk_tb(error.__traceback__) if "<frozen" not in call[0].f_code.co_filename]
    own = [call for call in calls if _top_level(str(call[0].f_globals.get("__name__"))) == _top_level(package)]
    if not own and (file := getattr(sys.modules.get(package), "__file__", None)):
        return str(file)
    frame, line = (own or calls)[-1]
    return f"{frame.f_code.co_filename}, line {line}"


def located(error: BaseException, plugin: Plugin | type[Plugin]) -> str:
    """What failed within a plugin and where, e.g. ``"ValueError: no such file (/path/my_plugin.py, line 12)"``."""
    return f"{type(error).__name__}: {error} ({place_of(error, plugin.__module__)})"


def _top_level(module: str) -> str:
    return module.partition(".")[0]


def _load(entry: EntryPoint) -> Loaded:
    """Import one plugin and call its hooks; an error is recorded and not raised."""
    package = package_behind(entry)
    start, missing = time.perf_counter(), [name for name in SLOW_BASES if name not in sys.modules]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to what the user asked for
            return Loaded(package, tuple(Offer(kind, cls, package) for kind, cls in _ask_hooks(entry)))
    except (Exception, SystemExit) as error:
        return Loaded(package, error=error)
    finally:
        is_ours = any(name in sys.modules for name in missing)
        if (seconds := time.perf_counter() - start) > SLOW_SECONDS and not is_ours:
            print(f"plugin {entry.name!r} ({package}) took {seconds:.1f} s to import", file=sys.stderr)


def _ask_hooks(entry: EntryPoint) -> list[tuple[PluginKind, type[Plugin]]]:
    # A pluggy manager of its own, so that neither a bad signature nor an exception reaches another plugin.
    pluggy_manager = pluggy.PluginManager(hookspecs.GROUP)
    pluggy_manager.add_hookspecs(hookspecs)
    module = entry.load()
    try:
        pluggy_manager.register(module, name=entry.name)
        pluggy_manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"{reason}; the hooks are {', '.join(HOOKS)}, and none takes an argument") from error
    if not pluggy_manager.get_hookcallers(module):
        raise PluginError(f"{entry.value} implements no hook; decorate one of {', '.join(HOOKS)} with @ffgym.hookimpl")
    offered = []
    for hook, kind in HOOKS.items():
        for cls in itertools.chain.from_iterable(getattr(pluggy_manager.hook, hook)()):
            check_class(kind, cls)
            offered.append((kind, cls))
    return offered


def check_class(kind: PluginKind, cls: Any) -> None:
    """Raise ``PluginError`` for what is no class of a kind, or has no name that could be asked for."""
    hook, base = KINDS[kind].hook, imported(KINDS[kind].base)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{hook} returned {cls!r}, which is not a subclass of ffgym.{base.__name__}")
    name = getattr(cls, "name", None)
    if name is None:
        raise PluginError(f"{hook} returned the class {cls.__qualname__} without `name`: add one")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PluginError(
            f"{hook} returned {cls.__qualname__}, whose name is {name!r}, not lower-case letters, digits, '-' and '_'"
        )
