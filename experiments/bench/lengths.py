"""What searches had found after a part of their tokens: perplexities of the incumbents that a bench has stored.

    python experiments/bench/lengths.py experiments/bench/final-[25]0.toml > experiments/bench/lengths.md

Prints a Markdown table a bench, means and standard errors over seeds. Where an agent's updates end at other tokens than
the header says, the cell names them.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from ffgym.bench.cell import CELL_RESULT
from ffgym.bench.file import read_bench
from ffgym.bench.table import CellResult, curves, mean_of
from ffgym.errors import FFGymError
from ffgym.types import perplexity_of


def table(file: Path) -> str:
    """The bench's Markdown table; the searches whose last incumbent is the best come first."""
    searches: dict[str, list[CellResult]] = defaultdict(list)
    for cell in map(CELL_RESULT.read, read_bench(file).results):
        if cell.agent != "one-shot":
            searches[cell.label].append(cell)
    rows = []
    for label, cells in searches.items():
        tokens, losses = curves(cells)
        rows.append((label, tokens, [mean_of([perplexity_of(loss) for loss in own]) for own in losses.T]))
    rows.sort(key=lambda row: row[2][-1].value)
    header = rows[0][1]
    heads = [f"{file.stem}, tokens", *(f"{at:,.0f}" for at in header)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * len(header)]
    for label, tokens, means in rows:
        marks = zip(means, tokens, header, strict=True)
        shown = [f"{mean}" if at == named else f"{mean} ({at:,.0f})" for mean, at, named in marks]
        lines.append(f"| {' | '.join([label, *shown])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print("\n\n".join(table(Path(file)) for file in sys.argv[1:]))
    except FFGymError as error:
        sys.exit(f"error: {error}")
