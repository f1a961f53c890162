"""What `ffgym measure` found: how large and how fast a dense model and a pruned one are, side by side.

One :class:`Measurement`: its two tables; JSON has its fields and the notes under the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ffgym.costs.timing import Spread, ends
from ffgym.measure.memory import Memory
from ffgym.measure.speed import DECODE_TOKENS, Speed
from ffgym.report.layout import Table, counted, humane, text_columns


@dataclass(frozen=True)
class Footprint:
    """How large one of the two models is."""

    model: str  # what it is, e.g. "SmolLM2-135M-Instruct, dequantised from Q4_1 GGUF"
    parameters: int  # tied ones once
    weight_bytes: int  # of the parameters, in the dtype that was measured
    disk_bytes: int  # of its safetensors files
    disk_dtype: str  # what most of the numbers in them are, e.g. "float16"
    macs: float  # multiply-accumulates per token at Measurement.context
    kv_bytes: float  # that one more token adds to the KV cache
    memory: Memory | None  # peak memory in a process of its own; None where the system does not say


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured, and how."""

    dense: Footprint
    pruned: Footprint
    speeds: tuple[Speed, ...]  # prefill and decode of every workload
    context: int  # tokens of context at which MACs are counted
    memory_work: tuple[int, int]  # batch and prompt length of the work that peak memory was measured at
    device: str
    threads: int  # of the CPU; 0 for an accelerator
    dtype: str
    torch: str
    transformers: str
    repetitions: int  # of which the figures are medians

    def tables(self) -> tuple[Table[Sequence[str]], Table[Sequence[str]]]:
        """Sizes, then speeds, how all was measured under them."""
        sizes = text_columns("", "dense", "pruned", "dense / pruned")
        speeds = text_columns("", "batch", "tokens", "dense, tokens/s", "pruned, tokens/s", "times as fast", "ceiling")
        return Table(sizes, size_rows(self), space=1), Table(speeds, list(speed_rows(self)), footnotes(self), space=1)


def size_rows(found: Measurement) -> list[tuple[str, str, str, str]]:
    """The rows of the size table: what, dense, pruned, ratio."""
    dense, pruned = found.dense, found.pruned
    rows = [
        _size("parameters", dense.parameters, pruned.parameters),
        _size("bytes on disk", dense.disk_bytes, pruned.disk_bytes, "B", notes=(dense.disk_dtype, pruned.disk_dtype)),
        _size("MACs/token", dense.macs, pruned.macs),
        _size("KV/token", dense.kv_bytes, pruned.kv_bytes, "B"),
        _size(f"weights in {found.dtype}", dense.weight_bytes, pruned.weight_bytes, "B"),
    ]
    if dense.memory is not None and pruned.memory is not None:
        rows += [
            _size("memory once loaded", dense.memory.net_loaded, pruned.memory.net_loaded, "B"),
            _size("peak memory", dense.memory.net_peak, pruned.memory.net_peak, "B"),
        ]
    return rows


def speed_rows(found: Measurement) -> Iterator[tuple[str, ...]]:
    """The rows of the speed table."""
    for speed in found.speeds:
        batch, tokens = str(speed.workload.batch), f"{speed.workload.length:,}"
        ratio = _spread(speed.ratio, "{:.2f}".format)
        yield speed.phase, batch, tokens, rate(speed.dense), rate(speed.pruned), ratio, f"{speed.ceiling:.2f}"


def footnotes(found: Measurement) -> list[str]:
    """How it was measured, and what the columns mean."""
    threads = f", {counted(found.threads, 'thread')}" if found.threads else ""
    lines = [
        f"Dense: {found.dense.model}. Pruned: {found.pruned.model}. {found.device}{threads}, {found.dtype}, "
        f"torch {found.torch}, transformers {found.transformers}. MACs at {found.context:,} tokens of context.",
        f"Speed: medians of {counted(found.repetitions, 'repetition')} in which the models take turns, "
        f"{ends(found.repetitions)} in brackets. Prefill: prompts of that many tokens into an empty cache, logits of "
        f"the last one. Decode: {DECODE_TOKENS} greedy steps on a cache of that many tokens. Times as fast: dense over "
        "pruned time of the same repetition. Ceiling: the ratio of multiply-accumulates (prefill), of bytes of weights "
        "and cache that a step reads (decode).",
    ]
    if all(getattr(found.dense, name) == getattr(found.pruned, name) for name in ("parameters", "macs", "kv_bytes")):
        lines.insert(1, "The same model twice, or two of the same size: ratios of speed differ from 1 by noise only.")
    if found.dense.memory is not None and found.pruned.memory is not None:
        lines.append(_memory_note(found, found.dense.memory, found.pruned.memory))
    return lines


def _memory_note(found: Measurement, dense: Memory, pruned: Memory) -> str:
    """Say what was saved beside what the parameters say."""
    batch, length = found.memory_work
    what = {
        "resident": "resident memory of a fresh process",
        "cuda": "memory that torch's CUDA allocator handed out in a fresh process",
    }[dense.kind]
    libraries = f", beyond the {humane(dense.before, 'B')} of Python and the libraries" if dense.before else ""
    loaded, peak = dense.net_loaded - pruned.net_loaded, dense.net_peak - pruned.net_peak
    weights = found.dense.weight_bytes - found.pruned.weight_bytes
    cache = batch * length * (found.dense.kv_bytes - found.pruned.kv_bytes)
    more = f", and the cache at the peak {_less(cache)}" if cache else ""
    return (
        f"Memory: {what}{libraries}; peak at {batch} x {length:,} tokens. The pruned model takes "
        f"{_less(loaded)} once loaded and {_less(peak)} at the peak; the parameters say {_less(weights)}{more}."
    )


def _less(saved: float) -> str:
    """``"42.0 MB less"``; of a small model, what the process takes may hide what was saved."""
    return f"{humane(abs(saved), 'B')} {'less' if saved >= 0 else 'more'}"


def _size(
    name: str, dense: float, pruned: float, unit: str = "", notes: tuple[str, str] = ("", "")
) -> tuple[str, str, str, str]:
    left, right = (f"{humane(value, unit)} {note}".rstrip() for value, note in zip((dense, pruned), notes, strict=True))
    return name, left, right, f"{dense / pruned:.2f}" if pruned > 0 else "-"


def rate(spread: Spread, unit: float = 1.0) -> str:
    """Median and quartiles (or range), three significant digits: repetitions seldom agree on more."""
    return _spread(spread, lambda value: _digits(unit * value))


def _spread(spread: Spread, text: Callable[[float], str]) -> str:
    """Median and quartiles (or range); a single repetition has none."""
    median, low, high = map(text, (spread.median, spread.low, spread.high))
    return median if spread.low == spread.high else f"{median} ({low}-{high})"


def _digits(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.{0 if value >= 100_000 else 1}f}k"
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(places, 2)}f}"
