"""What a console shows of results, which print themselves, and of tables."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def printed(*what: Any, width: int = 300) -> str:
    console = Console(file=io.StringIO(), width=width)
    for each in what:
        if hasattr(each, "print"):
            each.print(console)
        else:
            console.print(each)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
