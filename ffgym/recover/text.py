"""The text that training after pruning may use: what neither the search nor the report split holds.

Two guards keep the splits apart. By place: where the corpus is the text of a split, that split's tokens are left out.
By content: a window that repeats a run of ``REPEATED_TOKENS`` tokens of the search or the report split is left out too,
and another text that holds such a run of the report split is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ffgym.config.tables import RunConfig
from ffgym.data.corpora import Corpus, Role, load_text
from ffgym.data.repeats import REPEATED_TOKENS, run_hashes
from ffgym.data.splits import ROLES, Split, Splits, first_tokens, interleaved, windows_digest
from ffgym.errors import DataError
from ffgym.models.loading import LoadedModel
from ffgym.prepare.parts import cut_splits


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on."""

    name: str  # where they are from: "demo:c4", or a mixture
    source: str  # the same with what was read of it, where the name does not say so: "demo:c4 (c4.utf8)"
    # token ids, shape (windows, window), int64: as many as were asked for, or all that there are
    windows: torch.Tensor = field(repr=False)
    left_out: int  # windows that repeat text of the search or the report split, and are not among them
    digest: str


@dataclass(frozen=True)
class RecoveryTexts:
    """All text of a recovery."""

    splits: Splits  # the run's; the report split is measured at the end
    training: TrainingText
    # the last windows of the search split, which decide what weights to keep, shape (windows, length)
    held_out: torch.Tensor

    def describe(self, tokens: int) -> str:
        """What is trained on, and how often ``tokens`` tokens go through it where it holds fewer."""
        text = self.training
        available = text.windows.numel()
        epochs = tokens / available
        repeats = f", {f'{epochs:.2g}' if epochs < 10 else f'{epochs:,.0f}'} epochs" if epochs > 1 else ""
        left_out = f", {text.left_out} windows left out that repeat other splits" if text.left_out else ""
        return (
            f"training text: {text.source}, {available:,} tokens outside the search and "
            f"report splits{left_out}; {tokens:,} to learn from{repeats}"
        )


def gather(config: RunConfig, loaded: LoadedModel, splits: Splits | None = None) -> RecoveryTexts:
    """Cut the splits, and find text to train on that none of them reports or chooses on.

    Args:
        loaded: the model that is trained, or the dense one that it is made from: their tokens are the same.

    Raises:
        DataError: a corpus that is missing, too short, or holds text of the report split.
        ModelError: a tokenizer that is not the model's.
    """
    table, window = config.recover, config.data.window
    splits = splits or cut_splits(config, loaded)
    one_step = table.batch_tokens // window * window
    text = training_text(table.corpus, splits, loaded.tokenizer, window=window, tokens=table.tokens, at_least=one_step)
    loaded.check_ids(text.windows, "the training text")
    search = splits.search.windows
    return RecoveryTexts(splits, text, search[-max(1, table.held_out_tokens // search.shape[1]) :])


def training_text(
    spec: str | None, splits: Splits, tokenizer: Any, *, window: int, tokens: int, at_least: int
) -> TrainingText:
    """Read a corpus and leave out what other splits hold.

    Args:
        spec: a corpus, see ``ffgym.data.corpora``; ``None`` for what the calibration split is made of; its own
            windows may be trained on: they are what the refits saw.
        tokens: how many are wanted; fewer are handed out where the corpus holds fewer.
        at_least: how many there must be.

    Raises:
        DataError: the corpus is missing, too short, or another text that holds text of the report split.
    """
    calibration = splits.calibration
    known = {part.corpus.name: part.corpus for part in calibration.parts}
    if spec is None:
        name, corpora = calibration.text, [part.corpus for part in calibration.parts]
        turns = interleaved([part.share for part in calibration.parts], -(-tokens // window))
    else:
        name, corpora = spec, [known.get(spec) or load_text(spec, role="calibration")]
        turns = [0] * -(-tokens // window)
    found = [
        _free_windows(corpus, splits, tokenizer, window, turns.count(place)) for place, corpus in enumerate(corpora)
    ]
    free = np.concatenate([windows for windows, _ in found])
    parts = ", ".join(corpus.split for corpus in corpora if not corpus.name.endswith(corpus.split))  # not a file twice
    source = f"{name} ({parts})" if parts else name
    if free.size < at_least:
        raise DataError(
            f"corpus {source} has {free.size:,} tokens to train on outside the search and report splits, in whole "
            f"windows of {window:,}; one step needs {at_least:,}",
            hint="Name a longer corpus with --corpus, or lower recover.batch_tokens.",
        )
    chosen = torch.from_numpy(free.copy())
    return TrainingText(name, source, chosen, sum(left_out for _, left_out in found), windows_digest(chosen))


def _free_windows(corpus: Corpus, splits: Splits, tokenizer: Any, window: int, wanted: int) -> tuple[np.ndarray, int]:
    """Windows of a corpus that other splits do not hold, as many as are wanted or there are; how many were left out."""
    taken, bos = _places(corpus, splits), splits.calibration.bos
    begin = max((end for _, end in taken.values()), default=0)
    own = window - (bos == "every")  # tokens of the text in a window
    read = wanted * own
    while True:
        ids = np.array(first_tokens(corpus, begin + read, tokenizer, bos == "first"), dtype=np.int64)
        windows = _windows(ids, [taken[role] for role in ("search", "report") if role in taken], own)
        run = min(REPEATED_TOKENS, own)
        found = {role: _repeats(windows, getattr(splits, role), run) for role in ("search", "report")}
        if "report" not in taken and found["report"].any():
            first = windows[int(np.argmax(found["report"]))]
            raise DataError(
                f"corpus {corpus.name!r} holds text of the report split ({splits.report.text}): "
                f"{int(found['report'].sum())} of its windows repeat {run} tokens or more, the first one begins "
                f"{tokenizer.decode(first[:12].tolist())!r}",
                hint="Train on another corpus, or report on another: recover.corpus, data.report.",
            )
        repeated = found["search"] | found["report"]
        free = windows[~repeated][:wanted]
        if len(free) == wanted or len(ids) < begin + read:  # the corpus has no more
            if bos == "every":
                free = np.pad(free, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id)
            return free, int(repeated.sum())
        read *= 2


def _repeats(windows: np.ndarray, split: Split, run: int) -> np.ndarray:
    """Which windows share a run of tokens with a split, shape (windows,), bool."""
    text = torch.cat([part.text for part in split.parts]).numpy().reshape(1, -1)  # windows follow one another
    return np.asarray(np.isin(run_hashes(windows, run), run_hashes(text, run)).any(axis=1))


def _places(corpus: Corpus, splits: Splits) -> dict[Role, tuple[int, int]]:
    """Where in the corpus's tokens the splits of the same text lie, as (begin, end): in the order they were cut in."""
    places: dict[Role, tuple[int, int]] = {}
    begin = 0
    for role in ROLES:
        split: Split = getattr(splits, role)
        for part in split.parts:
            if part.corpus.digest == corpus.digest:
                places[role] = (begin, begin + part.text.numel())
                begin += part.text.numel()
    return places


def _windows(ids: np.ndarray, taken: list[tuple[int, int]], window: int) -> np.ndarray:
    """Whole windows between the places that are taken, shape (windows, window)."""
    pieces, begin = [], 0
    for start, end in [*sorted(taken), (len(ids), len(ids))]:
        piece = ids[begin : max(begin, start)]
        pieces.append(piece[: len(piece) // window * window].reshape(-1, window))
        begin = max(begin, end)
    return np.concatenate(pieces)
