"""Perplexity of models on any text, for ``ffgym eval --text``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffgym.config.mixture import shares
from ffgym.data.corpora import Corpus, load_text
from ffgym.data.splits import adds_bos, first_windows, windows_digest
from ffgym.errors import DataError, FFGymError
from ffgym.evaluation.perplexity import check_logits, evaluate
from ffgym.measure.metrics import CHECKED_TOKENS
from ffgym.models.origin import texts_of
from ffgym.types import Bos, OnStep

LONGEST_WINDOW = 1024  # tokens
TOKENS = 16384  # as a run's report split


@dataclass(frozen=True)
class TextLosses:
    """What a model loses on the beginning of a text."""

    losses: tuple[float, ...]  # of each window, nats per token
    window: int  # tokens of each
    digest: str  # of the windows' token ids: losses on equal ones may be compared


def text_losses(model: Any, tokenizer: Any, corpus: Corpus, *, limit: int | None, on_progress: OnStep) -> TextLosses:
    """Measure the first windows of a text; each begins with BOS where the tokenizer adds one, as in a run.

    Args:
        model: a Hugging Face causal LM in eval mode.
        limit: how many windows at most; ``None`` for as many as make 16,384 tokens. A window has 1,024 tokens, or the
            model's context where that is shorter.
        on_progress: called with (windows done, windows).

    Raises:
        DataError: the text is shorter than a window.
        ModelError: the model changes its logits in a way that ffgym does not know.
    """
    length = min(LONGEST_WINDOW, getattr(model.config, "max_position_embeddings", LONGEST_WINDOW))
    bos: Bos = "every" if adds_bos(tokenizer) else "none"
    windows, held = first_windows(corpus, limit or TOKENS // length, length, tokenizer, bos)
    if not len(windows):
        raise DataError(
            f"the text {corpus.name!r} has {held:,} tokens of this model, less than one window of {length:,}",
            hint="Name a longer text.",
        )
    check_logits(model, windows.flatten()[:CHECKED_TOKENS])
    losses = evaluate(model, windows, on_progress=on_progress).losses
    return TextLosses(tuple(losses), length, windows_digest(windows))


def digest_to_compare(name: str) -> str | None:
    """Digest of a text as a run that calibrates on it reads it; ``None`` where it cannot be read."""
    try:
        return load_text(name, role="calibration").digest
    except FFGymError:
        return None


def uses_of(corpus: Corpus, folder: Path, digest_of: Callable[[str], str | None]) -> tuple[str, ...]:
    """What was done with a text, by any name, when a saved model was made: ``"calibrated"``, ``"searched"``, ...

    Only what is here is compared with the text: nothing is fetched for this.

    Args:
        digest_of: `digest_to_compare`, which may remember what it has read.
    """
    texts = {how: shares(corpora) for how, corpora in texts_of(folder).items()}
    named = {name for names in texts.values() for name in names}
    here = {name for name in named if name == corpus.name or Path(name).expanduser().exists()}
    same = {name for name in here if digest_of(name) == corpus.digest}
    return tuple(how for how, names in texts.items() if same & names.keys())
