"""Write what follows the first fifth of a demo corpus: text of its domain, while the report reads the beginning.

python experiments/text/rest.py wiki code
ffgym bench experiments/text/*.toml
"""

from __future__ import annotations

import sys
from pathlib import Path

from ffgym.data.corpora import load_text
from ffgym.data.splits import SEPARATOR

CORPORA = Path(__file__).parent / "corpora"


def rest(spec: str) -> str:
    """All but the first fifth of a corpus, from the beginning of a line."""
    text = SEPARATOR.join(load_text(spec, role="search").documents)
    return text[text.index("\n", len(text) // 5) :].lstrip("\n")


if __name__ == "__main__":
    CORPORA.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        (CORPORA / f"{name}.txt").write_text(rest(f"demo:{name}"), encoding="utf-8")
