"""Mixtures of corpora: ``["3*demo:c4", "mine.txt"]`` is three quarters of the one and a quarter of the other."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Corpora = str | tuple[str, ...]
"""A corpus, or several with their weights; one without a weight has the weight 1."""
WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,2})?)\s*\*\s*(.+)")
EXAMPLE = '["3*demo:c4", "mine.txt"]'


def checked(value: Any) -> Corpora:
    """What a configuration holds; a list of one corpus is that corpus.

    Raises:
        ValueError: neither text nor a list of texts, no corpus, one that is named twice, a weight of 0 or less.
    """
    if isinstance(value, str) and value.startswith("["):  # of a command line
        raise ValueError(f"is no list in TOML; quote the names and the whole, e.g. --set 'data.search={EXAMPLE}'")
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"should be the name of a corpus or a list of names, each with or without a weight: {EXAMPLE}")
    if not entries or not all(entries):
        raise ValueError("should name a corpus")
    if isinstance(value, str):
        return value
    weights = [_weighted(entry) for entry in entries]
    names = [name for name, _ in weights]
    for name, weight in weights:
        if weight <= 0:
            raise ValueError(f"gives {name!r} the weight {float(weight):g}, which should be greater than 0")
        if names.count(name) > 1:
            raise ValueError(f"names {name!r} twice; a weight gives it more, e.g. '2*{name}'")
    return tuple(entries) if len(names) > 1 else names[0]


def shares(corpora: Corpora) -> dict[str, Fraction]:
    """The share of each corpus, by name, in the order in which they are named; all shares together are 1."""
    weights = {corpora: Fraction(1)} if isinstance(corpora, str) else dict(map(_weighted, corpora))
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def described(corpora: Corpora) -> str:
    """``"75% demo:c4 + 25% mine.txt"``; the name of a single corpus."""
    if isinstance(corpora, str):
        return corpora
    return " + ".join(f"{float(100 * share):.3g}% {name}" for name, share in shares(corpora).items())


def _weighted(entry: str) -> tuple[str, Fraction]:
    match = WEIGHTED.fullmatch(entry.strip())
    return (match[2], Fraction(match[1])) if match else (entry.strip(), Fraction(1))
