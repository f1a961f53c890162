"""Perplexity of models on any text, for ``ffgym eval --text``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ffgym.data.corpora import Corpus
from ffgym.data.splits import adds_bos, first_windows, windows_digest
from ffgym.errors import DataError
from ffgym.evaluation.perplexity import check_logits, evaluate
from ffgym.types import Bos

LONGEST_WINDOW = 1024  # tokens
TOKENS = 16384  # as a run's report split
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class TextLosses:
    """What a model loses on the beginning of a text.

    Attributes:
        losses: of each window, nats per token.
        window: tokens of each.
        digest: of the windows' token ids: losses on equal ones may be compared.
    """

    losses: tuple[float, ...]
    window: int
    digest: str


def text_losses(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    *,
    limit: int | None,
    on_progress: Callable[[int, int], None],
) -> TextLosses:
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
    done = 0

    def advance(further: int) -> None:
        nonlocal done
        done += further
        on_progress(done, len(windows))

    losses = evaluate(model, windows, on_batch=advance).losses
    return TextLosses(tuple(losses), length, windows_digest(windows))
