"""Evaluation metrics that are plugins: `ffgym eval` measures them beside lm-eval's tasks."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

from ffgym.errors import PluginError
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.contracts import as_number, call_plugin
from ffgym.types import OnStep

CHECKED_TOKENS = 16


class Metric(Plugin, ABC):
    """Scores a model on examples of its own; the figure is the mean of the scores, with its standard error.

    Attributes:
        text: what the examples are from, for the table.
    """

    kind = "metric"
    text: ClassVar[str] = ""

    @abstractmethod
    def scores(self, model: Any, tokenizer: Any, *, limit: int | None, on_progress: OnStep) -> Sequence[float]:
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
    text = "demo:wiki"

    def scores(self, model: Any, tokenizer: Any, *, limit: int | None, on_progress: OnStep) -> Sequence[float]:
        """The mean loss of each window, see `text_losses`."""
        from ffgym.data.corpora import load_text
        from ffgym.measure.texts import text_losses  # torch

        corpus = load_text(self.text, role="report")
        return text_losses(model, tokenizer, corpus, limit=limit, on_progress=on_progress).losses


def is_metric(name: str, tasks: Collection[str]) -> bool:
    """Whether a metric has a name; a plugin's comes after those of lm-eval's tasks."""
    return name in BUILTINS["metric"] or (name not in tasks and manager.is_name("metric", name))


def score(metric: Metric, model: Any, tokenizer: Any, limit: int | None, on_progress: OnStep) -> list[float]:
    """Let a metric score a model.

    Raises:
        PluginError: it raised, or returned no numbers, more than ``limit``, or, of a model whose
            logits are finite, numbers that are not.
    """

    def call() -> Any:
        scores = metric.scores(model, tokenizer, limit=limit, on_progress=on_progress)
        return list(scores) if isinstance(scores, Iterator) else scores  # a generator has not run before

    answer = call_plugin(metric, call, "scoring a model")
    who = f"{manager.described(metric)}: scores returned"
    try:
        scores = [as_number(each) for each in answer]
    except (TypeError, ValueError, RuntimeError):
        shape = getattr(answer, "shape", None)
        what = reprlib.repr(answer) if shape is None else f"{type(answer).__name__} of shape {tuple(shape)}"
        raise PluginError(f"{who} {what}, not numbers") from None
    if not scores:
        raise PluginError(f"{who} no number", hint="Score at least one example.")
    if limit is not None and len(scores) > limit:
        raise PluginError(f"{who} {len(scores)} numbers, more than limit = {limit}", hint="Score the first ones alone.")
    wrong = next((index for index, number in enumerate(scores) if not math.isfinite(number)), None)
    if wrong is not None and not manager.is_built_in(metric) and _is_finite(model):
        raise PluginError(f"{who} {scores[wrong]} for example {wrong + 1}, and the model's logits are finite")
    return scores


def _is_finite(model: Any) -> bool:
    """Whether a model that is given some token writes numbers."""
    import torch

    ids = torch.zeros(1, CHECKED_TOKENS, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        return bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
