"""A table, described once for the console, Markdown and JSON, and how numbers are written."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pydantic_core import from_json, to_json

from ffgym.types import JSONDict

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as Grid
    from rich.text import Text

R = TypeVar("R")
T = TypeVar("T")

# A no-break space keeps the star from standing on a line of its own.
STAR = "\N{NO-BREAK SPACE}*"


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column of a table whose rows are ``R``."""

    head: str
    text: Callable[[R], str]  # writes a row's cell; `STAR` at its end marks it
    left: bool = False  # it is text and stands on the left; numbers stand on the right
    plain: Callable[[R], JSONDict] | None = None  # what JSON has of it, by key; None for nothing
    bold: bool = False  # Markdown shows its cells of bold rows in bold
    once: bool = False  # a console shows it only where the first column differs from the row above
    # it moves into the caption where all rows show the same, and a console that is too narrow leaves it out
    spare: bool = False
    console_head: str | Text = ""  # its name on a console, e.g. with line breaks; empty where that is head
    look: Mapping[str, Any] = field(default_factory=dict)  # more options of rich's add_column


@dataclass(frozen=True)
class Table(Generic[R]):
    """Rows, and how every medium shows them."""

    columns: Sequence[Column[R]]
    rows: Sequence[R]
    notes: Sequence[str] = ()  # sentences that stand under it, one a line
    # columns of blanks after every cell on a console, beside the one that stands between two cells anyway
    space: int = 0
    is_bold: Callable[[R], bool] = lambda _: False  # the row is shown in bold
    # the row is what the others are compared with; a console draws a line under it
    is_reference: Callable[[R], bool] = lambda _: False
    caption: str = "In every row"  # what introduces the columns that are the same in all rows but the references
    plain: Callable[[R], JSONDict] = lambda _: {}  # what JSON has of a row beside its columns

    @property
    def shown(self) -> list[Column[R]]:
        """Columns whose cells differ, and those that always stay."""
        return [column for column in self.columns if self._constant(column) is None]

    @property
    def all_notes(self) -> list[str]:
        """The notes, after a caption that says what is the same in all rows."""
        same = [text for column in self.columns if (text := self._constant(column)) is not None]
        return [*([f"{self.caption}: {', '.join(same)}."] if same else []), *filter(None, self.notes)]

    def _constant(self, column: Column[R]) -> str | None:
        """What a spare column shows in all rows, e.g. ``"params 113.3 M (dense 134.5 M)"``; ``None`` if they differ."""
        rows = [row for row in self.rows if not self.is_reference(row)]
        cells = {column.text(row) for row in rows}
        if not column.spare or len(rows) < 2 or len(cells) > 1:
            return None
        others = [row for row in self.rows if self.is_reference(row) and column.text(row)]
        before = "".join(f" ({self.columns[0].text(row)} {column.text(row)})" for row in others)
        return f"{column.head} {cells.pop()}{before}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Spare columns are left out, the last first, where the console is too narrow for them; notes are dim."""
        from rich.measure import Measurement
        from rich.padding import Padding
        from rich.text import Text

        columns, left_out = self.shown, list[str]()
        wide = options.update(max_width=1_000)
        while Measurement.get(console, wide, grid := self.grid(columns)).maximum > options.max_width:
            spare = [column for column in columns if column.spare]
            if not spare:
                break
            columns.remove(spare[-1])
            left_out.insert(0, spare[-1].head)
        yield grid
        yield ""
        notes = self.all_notes
        if left_out:
            notes = [f"Left out, because the console is narrow: {', '.join(left_out)}.", *notes]
        yield from (Padding(Text(note, style="dim"), (0, 1)) for note in notes)

    def grid(self, columns: Sequence[Column[R]]) -> Grid:
        """Some of the columns, as ``rich`` draws them."""
        from rich import box
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=box.SIMPLE_HEAD, padding=(0, self.space, 0, 0), pad_edge=False, header_style="bold")
        grid.show_edge = False
        for column in columns:
            head = column.console_head or Text(column.head)
            grid.add_column(head, justify="left" if column.left else "right", **column.look)
        before = None
        for row in self.rows:
            name = columns[0].text(row)
            cells = ("" if column.once and name == before else column.text(row) for column in columns)
            grid.add_row(*map(Text, cells), style="bold" * self.is_bold(row), end_section=self.is_reference(row))
            before = name
        return grid

    def markdown(self) -> str:
        """Write the table as Markdown (GitHub's flavour), the notes under it."""
        lines = [[escape(column.head) for column in self.shown]]
        for row in self.rows:
            lines.append([_markdown_cell(column.text(row), column.bold and self.is_bold(row)) for column in self.shown])
        head, *rows = ("| " + " | ".join(cells) + " |\n" for cells in lines)
        rule = "|" + "".join("---|" if column.left else "---:|" for column in self.shown) + "\n"
        notes = "".join(f"\n- {escape(note)}" for note in self.all_notes)
        return "".join([head, rule, *rows, notes and f"{notes}\n"])

    def as_dicts(self) -> list[JSONDict]:
        """The rows as plain data, see `strict`."""
        parts = [*(column.plain for column in self.columns if column.plain is not None), self.plain]
        return strict([{key: value for part in parts for key, value in part(row).items()} for row in self.rows])


def label_column(label: Callable[[R], str], *, bold: bool = False) -> Column[R]:
    """The first column, which says what a row is called: on a console a long name takes several lines."""
    look = {"overflow": "fold"}
    return Column("model", label, left=True, plain=lambda row: {"label": label(row)}, bold=bold, look=look)


def numeric(
    head: str, text: Callable[[R], str], plain: Callable[[R], JSONDict], *, bold: bool = False, spare: bool = False
) -> Column[R]:
    """A column of numbers: on a console its head has line breaks, and its cells have none."""
    stacked = textwrap.fill(head, 14, break_on_hyphens=False).replace("/", "\n/")
    return Column(head, text, plain=plain, bold=bold, spare=spare, console_head=stacked, look={"no_wrap": True})


def text_columns(*heads: str, **look: Any) -> list[Column[Sequence[str]]]:
    """Columns of rows that are cells already, the first on the left; ``look`` as in `Column`."""
    return [
        Column(head, itemgetter(i), left=i == 0, console_head=head.replace(", ", "\n"), look=look)
        for i, head in enumerate(heads)
    ]


def _markdown_cell(text: str, bold: bool) -> str:
    star = " \\*" if text.endswith(STAR) else ""
    text = escape(text.removesuffix(STAR))
    return (f"**{text}**" if bold else text) + star


def escape(text: str) -> str:
    """Keep Markdown from reading pipes, stars and underscores of a label or a path as its own."""
    for sign in ("\\", "|", "*", "_", "<"):
        text = text.replace(sign, "\\" + sign)
    return text


def humane(value: float, unit: str = "") -> str:
    """Write a count with four digits at most and an SI prefix: ``134.5 M``, ``23.0 kB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,950 would be rounded to "1000.0 k": it belongs to the next prefix already.
        if abs(value) >= factor * 0.99995:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def percent(share: float) -> str:
    """Write a share with three digits at most: ``20%``, ``12.5%``."""
    return f"{100 * share:.3g}%"


def counted(number: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def strict(data: T) -> T:
    """The same data with ``None`` for NaN and the infinities, which JSON has no numbers for."""
    return cast(T, from_json(to_json(data, inf_nan_mode="null")))
