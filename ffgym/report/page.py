"""One self-contained HTML page about a run or a bench: it needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffgym.files import write_text
from ffgym.report.layout import Table
from ffgym.version import __version__


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    title: str
    summary: Sequence[str]  # sentences, the most important one first
    settings: Mapping[str, str]  # what was run, by name
    tables: Mapping[str, Table[Any]]  # the results by heading
    pictures: Mapping[Path, str]  # captions by PNG file; what is not there is left out
    repeat: str  # the command that does it again, or goes on with it
    configuration: str  # the whole of it, as TOML
    # Python that loads each saved model, by a line that says which one it is
    load: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()  # what a reader must know before anything else


def write_page(page: Page, path: Path) -> None:
    """Write the page as one HTML file, pictures included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    said = " ".join([*page.summary, *page.warnings])
    notes = []  # of each table, once on the page
    for table in page.tables.values():
        notes.append([note for note in table.all_notes if note not in said])
        said = " ".join([said, *notes[-1]])
    pictures = [
        (base64.b64encode(file.read_bytes()).decode("ascii"), caption)
        for file, caption in page.pictures.items()
        if file.is_file()
    ]
    tables = zip(page.tables, page.tables.values(), notes, strict=True)
    template = environment.get_template("page.html")
    write_text(path, template.render(page=page, tables=tables, pictures=pictures, version=__version__))
