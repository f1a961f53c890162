"""What the page about a bench shows."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from ffgym.bench.bench import bench
from ffgym.bench.file import read_bench
from ffgym.bench.table import BenchTable
from ffgym.config.toml import CONFIGURATION
from ffgym.errors import DataError
from ffgym.report.page import Page


def bench_page(file: Path) -> Page:
    """The page about the results of a bench so far; its table and picture are written again."""
    read = read_bench(file)
    tables = bench([file], progress=Console(quiet=True), only_report=True)
    command = f"ffgym bench {shlex.quote(str(file))}"
    if not tables:
        raise DataError(f"the bench {file} has no results yet", hint=f"Run it: {command}")
    done = len(read.results)
    missing = 0 if read.spec.dated else len(read.cells) - done
    return Page(
        title=read.spec.title,
        summary=[_best(tables[0]), tables[0].header],
        settings={
            "agents": ", ".join(read.spec.agents),
            "seeds": read.spec.seeds_in_words,
            "cells": f"{done} of {len(read.cells)} done" if missing else str(done),
            "baseline": ", ".join(read.spec.baseline),
        },
        tables={"The table": tables[0].layout()},
        pictures={file.with_suffix(".png"): "Report perplexity of each search's incumbent against the tokens it took."},
        repeat=command,
        configuration=CONFIGURATION.text(file),
        warnings=["This bench is not finished: the command at the end of this page goes on with it."] * bool(missing),
    )


def _best(table: BenchTable) -> str:
    """Who came out best, what ties with it, and the best heuristic beside it."""
    best, *others = table.rows
    sentence = f"The lowest perplexity is that of {best.label}: {best.perplexity}, {best.times_dense:.2f} x dense"
    sentence += f"; a tie with {', '.join(table.ties)}." if table.ties else "."
    heuristic = next((row for row in others if row.label == table.heuristic), None)
    if heuristic is None:
        return sentence
    against = f" ({best.label} against it, in nats per token: {best.difference})" if best.difference is not None else ""
    return f"{sentence} The best heuristic, {heuristic.label}, has {heuristic.perplexity}{against}."
