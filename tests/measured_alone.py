"""The obvious way to measure an allocation: cut the whole model, run it on one batch after another, put it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ffgym.data.examples import EncodedExample
from ffgym.evaluation.divergence import divergence_from, window_divergences
from ffgym.evaluation.evaluator import Evaluator, Request
from ffgym.evaluation.multiple_choice import batches, padded, right_answers, task_accuracy
from ffgym.evaluation.perplexity import evaluate, predicting
from ffgym.evaluation.slopes import mean_slopes, unit_slopes
from ffgym.models.cut import PrunableModel
from ffgym.models.walk import Stream, Walk, all_states
from ffgym.types import Evaluation, OnShare, do_nothing


def measured_alone(
    prunable: PrunableModel,
    request: Request,
    windows: torch.Tensor,
    examples: Sequence[EncodedExample] = (),
    *,
    calibrated: bool = True,
    tokens_per_batch: int = 4096,
) -> Evaluation:
    """What one request comes to by ordinary calls of the model; the dense model gets one window or example a call.

    Slopes are measured window by window too.
    """
    text, asked = windows[list(request.windows)], [examples[i] for i in request.examples]
    divergences = request.needs & {"kl", "reverse_kl"}
    examples_batch = 1 if request.kept == prunable.dense_units else tokens_per_batch
    batch = 1 if "slopes" in request.needs else examples_batch
    dense = [final_hidden(prunable.model, window[None]) for window in text] if divergences else []
    try:
        prunable.cut(request.kept, calibrated=calibrated)
        found = evaluate(prunable.model, text, tokens_per_batch=batch)
        if divergences and request.kept == prunable.dense_units:
            found = replace(found, kls=(0.0,) * len(text), reverse_kls=(0.0,) * len(text))
        elif divergences:
            found = compared(prunable.model, text, dense, divergences, tokens_per_batch=batch)
        if "accuracy" in request.needs:
            right = answered_right(prunable.model, asked, tokens_per_batch=examples_batch)
            found = replace(found, accuracy=task_accuracy(asked, right))
    finally:
        prunable.restore()
    found = replace(
        found,
        kls=found.kls if "kl" in divergences else None,
        reverse_kls=found.reverse_kls if "reverse_kl" in divergences else None,
    )
    if "slopes" in request.needs:
        hidden = [final_hidden(prunable.model, window[None])[0] for window in text]
        of = request.slopes_of
        objectives = None if of == "loss" else [divergence_from(prunable.model, each, of) for each in hidden]
        prunable.cut(request.kept, calibrated=calibrated)
        with torch.no_grad():
            states = all_states(Stream(Walk(prunable.model), torch.split(text, max(1, batch // text.shape[1]))))
        states = [[window for each in layer for window in each.split(1)] for layer in states]
        units = unit_slopes(prunable, text, request.kept, states, calibrated=calibrated, objectives=objectives)
        found = replace(found, slopes=mean_slopes(units))
    return found


def answered_right(model: Any, examples: Sequence[EncodedExample], *, tokens_per_batch: int = 4096) -> list[bool]:
    """Whether the right answer is the likeliest of each example."""
    right = [False] * len(examples)
    for batch in batches(examples, tokens_per_batch):
        asked = [examples[i] for i in batch]
        for index, answer in zip(batch, right_answers(asked, log_likelihoods(model, asked)), strict=True):
            right[index] = answer
    return right


def log_likelihoods(model: Any, examples: Sequence[EncodedExample]) -> list[list[float]]:
    """Log-likelihood of every answer given its context, in nats, by an ordinary call of the model."""
    rows = padded(model, examples)
    with torch.inference_mode():
        hidden = model.base_model(
            input_ids=rows.ids, position_ids=rows.positions, attention_mask=rows.mask, use_cache=False
        ).last_hidden_state
        return rows.log_likelihoods(model, hidden)


def final_hidden(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Final hidden states that predict a token, shape (windows, length - 1, d)."""
    with torch.inference_mode():
        return predicting(model, windows)[0]


def compared(
    model: Any,
    windows: torch.Tensor,
    dense_hidden: Sequence[torch.Tensor],
    needs: frozenset[str],
    *,
    tokens_per_batch: int = 4096,
) -> Evaluation:
    """Losses and divergences of a model from the one whose `final_hidden` states these are, one window each."""
    size = max(1, tokens_per_batch // windows.shape[1])
    rows = []
    with torch.inference_mode():
        for start in range(0, len(windows), size):
            hidden, targets = predicting(model, windows[start : start + size])
            dense = torch.cat(list(dense_hidden[start : start + size]))
            rows.append(window_divergences(model, hidden, dense, targets, needs))
    losses, kls, reverse_kls = (tuple(row) for row in torch.cat(rows, dim=1).tolist())
    return Evaluation(
        losses,
        windows.shape[1] - 1,
        kls=kls if "kl" in needs else None,
        reverse_kls=reverse_kls if "reverse_kl" in needs else None,
    )


class Recording:
    """An executor that notes what it is asked for, and hands it on.

    Attributes:
        calls: the requests of every call.
    """

    def __init__(self, executor: Evaluator) -> None:
        self._executor = executor
        self.calls: list[list[Request]] = []

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        self.calls.append(list(requests))
        return self._executor.measure(requests, on_progress)
