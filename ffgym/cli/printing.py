"""What commands print to stdout: JSON, and columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from ffgym.report.layout import strict


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text, columns aligned."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(data: Any) -> None:
    """Print strict JSON: what is no number becomes null, a path its text."""
    typer.echo(json.dumps(strict(data), indent=2, ensure_ascii=False))
