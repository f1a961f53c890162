"""What commands print to stdout: JSON, and columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text, columns aligned."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(data: Any) -> None:
    """Print strict JSON: what is no number becomes null."""
    typer.echo(json.dumps(_strict(data), indent=2, ensure_ascii=False, allow_nan=False))


def _strict(data: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(data, Mapping):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
