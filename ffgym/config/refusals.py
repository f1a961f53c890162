"""A refused configuration in the words of its TOML: table, key, value, what was expected, the nearest match."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from ffgym.config.tables import RunConfig, table_model
from ffgym.errors import ConfigError


def config_error(error: ValidationError, model: type[BaseModel], table: str = "") -> ConfigError:
    """Say a pydantic error in the words of the TOML: table, key, value, and what was expected.

    The table is the one that a plugin's ``Config`` validates; of `RunConfig` every error names its own.
    """
    problems: dict[str, list[str]] = {}
    hints: list[str] = []
    for item in error.errors():
        owner, where, path = model, table, [str(part) for part in item["loc"]]
        if model is RunConfig and len(path) > 1:
            owner, where, path = table_model(path[0]), path[0], path[1:]
        key = path[0] if path else ""
        problem, expected, *advice = _explain(item["type"], item["msg"], item["input"], owner, where, key)
        problems.setdefault(problem, []).extend([expected] if expected else [])
        hints += [hint for hint in advice if hint and hint not in hints]
    message = "\n".join(problem + _either(expected) for problem, expected in problems.items())
    return ConfigError(message, hint=" ".join(hints) or None)


def _either(expected: list[str]) -> str:
    """``["should be 'auto'", "should be a valid number"]`` -> ``"should be 'auto' or a valid number"``."""
    return " or ".join([*expected[:1], *(text.removeprefix("should be ") for text in expected[1:])])


def _shared_keys(owner: type[BaseModel], table: str) -> list[str]:
    """Keys that a table has whatever plugin it names, where ``owner`` is that plugin's ``Config``."""
    model = table_model(table) if table in RunConfig.model_fields else owner
    named_by = getattr(model, "named_by", None)
    return [] if model is owner else [key for key in model.model_fields if key != named_by]


def _explain(kind: str, message: str, value: Any, owner: type[BaseModel], table: str, key: str) -> tuple[str, ...]:
    """(problem, what was expected, hints, one after another) for one pydantic error."""
    full_key = ".".join(part for part in (table, key) if part)
    place = f"[{table}]" if table else "the configuration"
    known = [*owner.model_fields, *_shared_keys(owner, table)]
    if kind == "extra_forbidden":
        tables = [name for name in RunConfig.model_fields if name != "seed"]
        homes = [f"{name}.{key}" for name in tables if key in table_model(name).model_fields]
        near = homes if owner is RunConfig or len(homes) == 1 else []  # the table is missing or wrong
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        guess = f"Did you mean {near[0]!r}?" if near else ""
        unknown = f"unknown {'key' if table else 'table or key'} {key!r} in {place}"
        return unknown, "", guess, f"Known in {place}: {', '.join(known) or 'none'}."
    if kind == "missing":
        hint = f"Write `{key} = ...` under {place}, or give a run --set {full_key}=VALUE." if table else ""
        return f"{place} needs a value for {key!r}", "", hint
    field = owner.model_fields.get(key)
    described = f"{full_key}: {field.description}." if field is not None and field.description else ""
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    if kind in ("model_type", "dict_type"):
        return f"{full_key} = {shown}: ", "should be a table", f"Write [{full_key}] and its keys below it."
    if kind == "tuple_type":
        hint = f"On the command line, quote the list: --set '{full_key}=[...]'."
        return f"{full_key} = {shown}: ", "should be a list", described, hint
    if kind == "too_short" and isinstance(value, list):
        return f"{full_key} = {shown}: ", "needs at least one entry", described
    if kind == "string_pattern_mismatch":
        return f"{full_key} = {shown}: ", "has none of the allowed forms", described
    expected = re.sub("(Input|String) should", "should", message.removeprefix("Value error, "))
    return f"{full_key} = {shown}: ", expected, described
