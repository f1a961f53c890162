"""Configurations as text and back: TOML files, overrides on the command line, and what is stored beside results."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from ffgym.config.refusals import config_error
from ffgym.config.tables import PLUGIN_TABLES, PluginTable, RunConfig, table_model
from ffgym.errors import ConfigError
from ffgym.files import FileFormat, json_digest, parse_toml
from ffgym.types import JSONDict

INDIFFERENT = {"output", "tracking", "workers"}  # tables that decide no number
CONFIGURATION = FileFormat(
    "configuration",
    dict[str, Any],
    ConfigError,
    "Correct it, or print another: ffgym config. Of a run's, MLflow and the saved model's folder have copies.",
)


def load_config(
    path: str | Path | RunConfig | Mapping[str, Any] | None = None, overrides: str | Sequence[str] = (), **values: Any
) -> RunConfig:
    """Resolve a run's configuration; later sources win: defaults, TOML file, ``overrides``, ``values``.

    Naming another plugin in ``overrides`` or ``values`` drops the options that the file gave to its own plugin.

    Args:
        path: a TOML file, in its place another configuration or a dict of tables, or ``None``.
        overrides: one or several ``"table.key=value"``; the value is a TOML literal, or else taken as a string.
        **values: tables as dicts (``prune={"sparsity": 0.3}``) and ``seed``; ``None`` means not given. Paths and
            numbers of NumPy are taken, too.

    Raises:
        ConfigError: missing or malformed file or override, unknown table or key, mistyped or impossible value.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    command_line = _merged(parsed_overrides(overrides), given_values(values, RunConfig))
    if isinstance(path, RunConfig):
        file = path.model_dump()
    elif path is None or isinstance(path, Mapping):
        file = given_values(path or {}, RunConfig)
    else:
        file = read_toml(Path(path).expanduser())
        if file.keys() >= {"agents", "seeds"}:
            raise ConfigError(
                f"{path} is a bench file: it names agents and seeds",
                hint=f"Run it: ffgym bench {shlex.quote(str(path))}",
            )
    try:
        return RunConfig.model_validate(layered(file, command_line))
    except ValidationError as error:
        raise config_error(error, RunConfig) from None


def to_toml(config: RunConfig, meanings: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Print the whole configuration, defaults included, as TOML with a comment on every key; `load_config` reads it.

    Args:
        meanings: of plugins' options, by table and option, which only the plugins know.
    """
    plain = config.model_dump()
    for table in plain.values():
        if isinstance(table, dict):
            table.update({key: "" for key, value in table.items() if value is None})
    table_name, lines = "", []
    for line in tomli_w.dumps(plain).rstrip("\n").split("\n"):  # and at nothing else that a value may hold
        if header := re.fullmatch(r"\[(.+)\]", line):
            table_name = header[1]
        said = (meanings or {}).get(table_name, {}).get(line.partition(" = ")[0]) or _meaning(table_name, line)
        comment = "".join(sign for sign in " ".join(said.split()) if sign.isprintable())  # all that TOML takes
        lines.append(f"{line}  # {comment}" if said else line)
    return "\n".join(lines) + "\n"


def settings(config: RunConfig) -> JSONDict:
    """What decides the numbers of a search, as plain JSON data.

    That is every table but ``recover``, ``output``, ``tracking`` and ``workers``.
    """
    return config.model_dump(mode="json", exclude={"recover", *INDIFFERENT})


def digest(config: RunConfig) -> str:
    """Identify what decides the numbers of a search: the `json_digest` of its `settings`."""
    return json_digest(settings(config))


def changed_settings(stored: JSONDict, config: RunConfig) -> list[str]:
    """Say where a configuration differs from `settings` that were stored earlier, one line a key; none if it does not.

    A key that did not exist when they were stored counts as its default: results stay valid when ffgym learns
    something new, and do not when the default of a key that they hold is changed.
    """
    try:
        then = flatten(settings(RunConfig.model_validate(stored)))
    except ValidationError as error:
        return config_error(error, RunConfig).message.splitlines()
    except ConfigError as error:
        return [error.message]
    now = flatten(settings(config))
    changes = sorted(_differences(then, now), key=lambda change: change[0])
    return [f"{key} was {written(before)} and is {written(after)} now" for key, before, after in changes]


def differences(one: RunConfig, other: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations differ in what decides a run: (key, value in one, in the other)."""
    return _differences(*(flatten(config.model_dump(mode="json", exclude=INDIFFERENT)) for config in (one, other)))


def _differences(one: JSONDict, other: JSONDict) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in one, in the other) wherever two flat tables differ, in the order of their keys."""
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def written(value: Any) -> str:
    """A setting's value as it stands in a configuration file; "unset" for none."""
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def flatten(tables: Mapping[str, Any], prefix: str = "") -> JSONDict:
    """``{"prune": {"sparsity": 0.2}}`` -> ``{"prune.sparsity": 0.2}``; an empty table stays one."""
    flat: JSONDict = {}
    for key, value in tables.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _meaning(table: str, line: str) -> str:
    key = line.partition(" = ")[0]
    if table and table not in RunConfig.model_fields:  # a nested table of a plugin's options
        return ""
    owner = table_model(table) if table else RunConfig
    if line == f"[{table}]":
        return (owner.__doc__ or "").strip().splitlines()[0]
    field = owner.model_fields.get(key)
    return "" if field is None else field.description or ""


def read_toml(path: Path) -> JSONDict:
    """Read a TOML file, or JSON by that name; raise ``ConfigError`` where it is missing, unreadable or malformed."""
    if path.is_file() and path.suffix not in (".toml", ".json"):
        raise CONFIGURATION.refused(str(path), "its name does not end in .toml")
    return CONFIGURATION.read(path)


def parsed_overrides(overrides: Sequence[str]) -> JSONDict:
    """``["prune.sparsity=0.3"]`` -> ``{"prune": {"sparsity": 0.3}}``; the last word on a key wins."""
    tables: JSONDict = {}
    for text in overrides:
        dotted, equals, literal = text.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not equals or not all(keys):
            raise ConfigError(f"cannot read --set {text!r}", hint="Write --set KEY=VALUE.")
        nested: Any = _parse_literal(literal.strip())
        for key in reversed(keys):
            nested = {key: nested}
        tables = _merged(tables, nested)
    return tables


def _parse_literal(text: str) -> Any:
    try:
        parsed = parse_toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise ConfigError(f"cannot read --set {reprlib.repr(text)}: {error}", hint="Give it another value.") from None
    return parsed["value"] if len(parsed) == 1 else text


def given_values(values: Mapping[str, Any], table: type[BaseModel]) -> JSONDict:
    """What the caller gave, as plain data.

    ``None`` was not given, and is dropped unless the table has no such key: that shall be refused.
    """
    given: JSONDict = {}
    for key, value in values.items():
        is_known = key in table.model_fields or issubclass(table, PluginTable)
        if isinstance(value, Mapping):
            is_table = is_known and table is RunConfig and key != "seed"
            value = given_values(value, table_model(key) if is_table else PluginTable)
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif hasattr(value, "tolist"):  # a number or an array of NumPy
            value = value.tolist()
        if not is_known or (value is not None and value != {}):
            given[key] = value
    return given


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> JSONDict:
    """``over`` on top of ``base``, table by table."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def layered(below: JSONDict, above: JSONDict) -> JSONDict:
    """The tables ``above`` on top of those ``below``, without options of plugins that ``above`` replaces by others."""
    kept = dict(below)
    for table, model in PLUGIN_TABLES.items():
        replaced, given, key, shared = below.get(table), above.get(table), model.named_by, model.model_fields
        if not isinstance(replaced, dict) or not isinstance(given, dict) or key not in given:
            continue
        if given[key] != replaced.get(key, shared[key].default):
            kept[table] = {key: value for key, value in replaced.items() if key in shared}
    return _merged(kept, above)
