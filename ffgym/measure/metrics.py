"""Evaluation metrics that are plugins: `ffgym eval` measures them beside lm-eval's tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, ClassVar

from ffgym.errors import DataError, PluginError
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.contracts import call_plugin
from ffgym.types import Bos

LONGEST_WINDOW = 1024  # tokens
TOKENS = 16384  # as a run's report split
CHECKED_TOKENS = 16


class Metric(Plugin, ABC):
    """Scores a model on examples of its own; the figure is the mean of the scores, with its standard error.

    Attributes:
        higher_is_better: which way is good.
        text: what the examples are from, for the table.
    """

    kind = "metric"
    higher_is_better: ClassVar[bool] = True
    text: ClassVar[str] = ""

    @abstractmethod
    def scores(
        self, model: Any, tokenizer: Any, *, limit: int | None, on_progress: Callable[[int, int], None]
    ) -> Sequence[float]:
        """Score every example, at least one.

        Args:
            model: a Hugging Face causal LM in eval mode; leave it as it is.
            tokenizer: of the model.
            limit: take only the first examples; ``None`` for all.
            on_progress: to be called with (examples done, examples).
        """


class Loss(Metric):
    """Nats per token on the demo's Wikipedia text, which no search sees; the scores are those of windows."""

    name = "loss"
    higher_is_better = False
    text = "demo:wiki"

    def scores(
        self, model: Any, tokenizer: Any, *, limit: int | None, on_progress: Callable[[int, int], None]
    ) -> Sequence[float]:
        """The mean loss of each window; a window is as long as the model's context, at most 1,024 tokens."""
        from ffgym.data.corpora import load_text
        from ffgym.data.splits import adds_bos, first_windows
        from ffgym.evaluation.perplexity import check_logits, evaluate

        window = min(LONGEST_WINDOW, getattr(model.config, "max_position_embeddings", LONGEST_WINDOW))
        count = TOKENS // window if limit is None else min(limit, TOKENS // window)
        bos: Bos = "every" if adds_bos(tokenizer) else "none"
        windows, held = first_windows(load_text(self.text, role="report"), count, window, tokenizer, bos)
        if len(windows) < count:
            raise DataError(f"{self.text} has {held} tokens of this model, fewer than {count * window}")
        check_logits(model, windows.flatten()[:CHECKED_TOKENS])
        done = 0

        def advance(further: int) -> None:
            nonlocal done
            done += further
            on_progress(done, count)

        return evaluate(model, windows, on_batch=advance).losses


def is_metric(name: str, tasks: Collection[str]) -> bool:
    """Whether a metric has a name; a plugin's comes after those of lm-eval's tasks."""
    return name in BUILTINS["metric"] or (name not in tasks and manager.is_name("metric", name))


def score(
    metric: Metric, model: Any, tokenizer: Any, limit: int | None, on_progress: Callable[[int, int], None]
) -> list[float]:
    """Let a metric score a model.

    Raises:
        PluginError: it raised, or returned no numbers; whether they are finite is the model's doing.
    """
    call = partial(metric.scores, model, tokenizer, limit=limit, on_progress=on_progress)
    answer = call_plugin(metric, call, "scoring a model")
    try:
        scores = [float(number) for number in answer]
    except (TypeError, ValueError):
        raise PluginError(f"{manager.described(metric)}: scores returned {answer!r}, not numbers") from None
    if not scores:
        raise PluginError(f"{manager.described(metric)}: scores returned no number", hint="Score at least one example.")
    return scores
