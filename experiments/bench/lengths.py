"""What searches had found after a part of their tokens: perplexities of the incumbents that a bench has stored.

    python experiments/bench/lengths.py final-20 final-50 > experiments/bench/lengths.md

Prints a Markdown table a bench, means and standard errors over seeds. Where an agent's updates end at other tokens than
the header says, the cell names them.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def curves(bench: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """By agent: tokens at its marks, and perplexities, shape (seeds, marks); agents that stop at once are left out."""
    marks = defaultdict(list)
    for file in sorted((HERE / "results" / bench).glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        if len(cell["marks"]) > 1:
            marks[cell["label"]].append(cell["marks"])
    return {
        label: ([mark["tokens"] for mark in seeds[0]], np.exp([[mark["loss"] for mark in own] for own in seeds]))
        for label, seeds in marks.items()
    }


def table(bench: str) -> str:
    """The bench's Markdown table; the searches whose last incumbent is the best come first."""
    found = sorted(curves(bench).items(), key=lambda item: item[1][1][:, -1].mean())
    header = found[0][1][0]
    lines = [
        f"| {bench}, tokens | " + " | ".join(f"{tokens:,}" for tokens in header) + " |",
        "|---|" + "---:|" * len(header),
    ]
    for label, (tokens, perplexities) in found:
        cells = []
        for at, named, values in zip(tokens, header, perplexities.T, strict=True):
            error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{error}" + ("" if at == named else f" ({at:,})"))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(map(table, sys.argv[1:])))
