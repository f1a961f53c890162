"""What installed packages offer in the entry point group ``ffgym``, loaded one by one when needed, and checked.

A failure is recorded. It only stops a run that needs something that the failed plugin might provide.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import pluggy
from pydantic import ValidationError

from ffgym.config.tables import table_model
from ffgym.errors import PluginError, first_line
from ffgym.plugins import hookspecs
from ffgym.plugins.bases import Plugin, PluginConfig, Reward
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

FOLLOWED = ("loss", "kl", "reverse_kl", None)
"""What a reward may fall with."""

WITHOUT_OPTIONS = ("calibration", "corpus", "family", "metric", "resource")
"""Kinds that no table or command holds options of."""

TYPES: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    str: (str, "text"),
    float: ((int, float), "a number"),
    tuple: ((tuple, list), "a tuple of names"),
    frozenset: ((set, frozenset), "a frozenset of names"),
    dict: (Mapping, "a dict"),
}
"""What an attribute must be, by the type of the base class's value, and how a message says it."""

AGENT_COUNTS = (("slope_episodes", 0), ("least_episodes", 1), ("update_episodes", 1), ("recommendations", 0))
REWARD_COUNTS = (("examples", 1),)
"""Attributes that are whole numbers, and the least that each may be."""

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
    """Why an offer is not used (its name is taken, or has several owners); ``None`` if it is used."""
    name = offer.cls.name
    if name in BUILTINS[offer.kind]:
        return f"{offer.kind} {name!r} is a built-in, which is used; the plugin has to be renamed"
    found = providers(offer.kind, name)
    if len(found) > 1:
        return conflict(found)
    if found != [offer]:
        return f"{offer.kind} {name!r} is provided by {found[0].package}, whose entry point has that name"
    return None


def conflict(offers: Sequence[Offer]) -> str:
    """Say that several packages provide one name."""
    packages = " and ".join(str(offer.package) for offer in offers)
    what = f"{offers[0].kind} {offers[0].cls.name!r}"
    return f"{len(offers)} installed packages provide {what}, so none of them is used: {packages}"


def place_of(error: BaseException, package: str) -> str:
    """Where something failed: the last line of a package that was running.

    Where none was, because ffgym refuses what the package returned, the file; of a file that could not be imported, the
    last line of all.

    Args:
        package: the name of a module within it.

    Returns:
        ``"/path/my_plugin.py, line 12"``.
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
                check_class(kind, cls)
                offered.append((kind, cls))
    return offered


def check_class(kind: PluginKind, cls: Any) -> None:
    """Raise ``PluginError`` for what is not a complete plugin class of a kind."""
    hook, table = KINDS[kind].hook, KINDS[kind].table
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
    keys = table_model(table).model_fields if table else {}
    if kind in ("heuristic", "recovery") and name == "none":
        raise PluginError(f"a {kind} cannot be called 'none': it means none in the table [{table}]")
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, PluginConfig)):
        raise PluginError(f"{kind} {name!r}: its Config is not a subclass of ffgym.PluginConfig")
    if taken := sorted(cls.Config.model_fields.keys() & {"name", *keys}):
        raise PluginError(f"{kind} {name!r}: its Config has an option {taken[0]!r}, a key that its table has already")
    if kind in WITHOUT_OPTIONS and cls.Config.model_fields:
        raise PluginError(f"{kind} {name!r}: its Config has options, and no {kind} can be given any")
    if wrong := _wrong_default(cls.Config):
        raise PluginError(f"{kind} {name!r}: its Config's default of {wrong}")
    if not (isinstance(cls.edition, int) and cls.edition >= 1):
        raise PluginError(f"{kind} {name!r}: edition is {cls.edition!r}, not a whole number from 1")
    _check_methods(f"{kind} {name!r}", cls, base)
    check_attributes(kind, name, cls)


def _wrong_default(config: type[PluginConfig]) -> str | None:
    """``"power is 'two': should be a valid number"``; an option may have no default, and so no wrong one."""
    try:
        config()
    except ValidationError as error:
        for item in error.errors():
            if item["loc"] and item["type"] != "missing":
                said = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
                return f"{item['loc'][0]} is {item['input']!r}: {said}"
    except Exception:  # the plugin's own check fails, which is said once it is chosen
        return None
    return None


def _check_methods(who: str, cls: type[Plugin], base: type[Plugin]) -> None:
    """Refuse a method that cannot be called as its base class's is, as after a change of the contract."""
    contracts = [vars(each) for each in cls.__mro__ if each.__module__ in (base.__module__, Plugin.__module__)]
    for name, method in ((name, method) for contract in contracts for name, method in contract.items()):
        own, is_called = inspect.getattr_static(cls, name), not name.startswith("_") or name in ("__init__", "__call__")
        if own is method or not (is_called and inspect.isfunction(own) and inspect.isfunction(method)):
            continue
        called = inspect.signature(method)
        by_name = {p.name: None for p in called.parameters.values() if p.kind is p.KEYWORD_ONLY}
        try:
            inspect.signature(own).bind(*[None] * (len(called.parameters) - len(by_name)), **by_name)
        except TypeError:
            ours, theirs = (_without_types(inspect.signature(each)) for each in (method, own))
            raise PluginError(f"{who} defines {name}{theirs}, and ffgym calls {name}{ours}") from None


def _without_types(signature: inspect.Signature) -> inspect.Signature:
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def check_attributes(kind: PluginKind, name: str, plugin: Plugin | type[Plugin]) -> None:
    """Hold what a plugin says of itself to types and ranges: a class, or an instance that has set attributes itself.

    Raises:
        PluginError: names the attribute, its value, and what it may be.
    """
    package = package_that_offers(plugin if isinstance(plugin, type) else type(plugin))
    who = f"{kind} {name!r}" + (f" (package {package})" if package else "")
    base: type[Plugin] = imported(KINDS[kind].base)
    said: dict[str, Any] = {}
    for attribute in (attribute for attribute in dir(base) if not attribute.startswith("_")):
        default, value = getattr(base, attribute), _read(who, plugin, attribute)
        if type(default) not in TYPES or isinstance(value, property) or (attribute, value) == ("kv_heads", None):
            continue  # a property has its value in an instance
        said[attribute] = value
        expected, what = TYPES[type(default)]
        are_names = not isinstance(value, tuple | list) or all(isinstance(each, str) for each in value)
        if not (isinstance(value, expected) and are_names):
            raise PluginError(f"{who}: {attribute} is {value!r}, not {what}")
    needs, worst = said.get("needs", frozenset()), said.get("worst", 0.0)
    known, what = (MEASUREMENTS, "measurements") if kind == "reward" else (STATISTICS, "statistics")
    if not needs <= known:
        raise PluginError(f"{who} needs unknown {what} {sorted(needs - known)}; known: {sorted(known)}")
    followed = plugin.falls_with if isinstance(plugin, Reward) else None
    if followed not in FOLLOWED:
        raise PluginError(f"{who}: falls_with is {followed!r}, not one of {', '.join(map(repr, FOLLOWED))}")
    if followed not in (None, "loss", *needs):
        raise PluginError(f"{who}: falls_with is {followed!r}, which is not in its needs")
    if not math.isfinite(worst):
        raise PluginError(f"{who}: worst is {worst!r}, not a finite number")
    for attribute, least in AGENT_COUNTS if kind == "agent" else REWARD_COUNTS if isinstance(plugin, Reward) else ():
        value = _read(who, plugin, attribute)
        if isinstance(value, property) or (attribute, value) == ("update_episodes", None):
            continue
        if not (isinstance(value, int) and value >= least):
            raise PluginError(f"{who}: {attribute} is {value!r}, not a whole number from {least}")


def _read(who: str, plugin: Plugin | type[Plugin], attribute: str) -> Any:
    """An attribute, which may be a property that fails."""
    try:
        return getattr(plugin, attribute)
    except Exception as error:
        raise PluginError(f"{who}: {attribute} cannot be read: {located(error, plugin)}") from error
