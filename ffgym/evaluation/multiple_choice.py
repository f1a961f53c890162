"""Multiple choice: which answer the model finds likeliest, by the summed log-likelihood of its tokens (``acc``).

All answers to a question share its context, so they share one row: context, then the answers one after another, each
at the positions that follow the context and blind to the other answers. The log-likelihoods are those of separate rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ffgym.data.examples import EncodedExample
from ffgym.errors import ModelError
from ffgym.evaluation.perplexity import token_losses


@torch.inference_mode()
def answered_right(model: Any, examples: Sequence[EncodedExample], *, tokens_per_batch: int = 4096) -> np.ndarray:
    """Whether the right answer is the likeliest of each example.

    Args:
        model: a Hugging Face causal LM in eval mode.
        examples: questions as token ids.
        tokens_per_batch: tokens in one forward pass, padding included (whole examples, at least one).

    Returns:
        shape (examples,), bool; the first of equally likely answers counts, and none where a likelihood is not finite.
    """
    right = np.zeros(len(examples), dtype=bool)
    for batch in _batches(examples, tokens_per_batch):
        for index, likelihoods in zip(batch, log_likelihoods(model, [examples[i] for i in batch]), strict=True):
            best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
            right[index] = all(map(math.isfinite, likelihoods)) and best == examples[index].right
    return right


def task_accuracy(examples: Sequence[EncodedExample], right: Sequence[bool] | np.ndarray) -> float:
    """Mean over tasks of the share of their examples that were answered right, in [0, 1]."""
    tasks = sorted({example.task for example in examples})
    shares = [np.mean([r for e, r in zip(examples, right, strict=True) if e.task == task]) for task in tasks]
    return float(np.mean(shares))


@torch.inference_mode()
def log_likelihoods(model: Any, examples: Sequence[EncodedExample]) -> list[list[float]]:
    """Log-likelihood of every answer given its context, in nats, in one forward pass.

    Args:
        model: a Hugging Face causal LM in eval mode.
        examples: questions as token ids.

    Returns:
        for each example a number per answer.

    Raises:
        ModelError: an example is longer than the model's sliding window, and its mask would be another one.
    """
    device = model.get_input_embeddings().weight.device
    length = max(example.tokens for example in examples)
    window = getattr(model.config, "sliding_window", None)
    longest = max(len(example.context) + max(map(len, example.answers)) for example in examples)
    if window is not None and longest > window:
        raise ModelError(
            f"an example of {longest} tokens is longer than the model's sliding window of {window}",
            hint="Take tasks with shorter examples, or another reward.",
        )
    ids, positions, branches = torch.zeros(3, len(examples), length, dtype=torch.int64)
    branches -= 1  # padding is a branch of its own
    sources: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        tokens, places, owners = list(example.context), list(range(len(example.context))), [0] * len(example.context)
        for number, answer in enumerate(example.answers, start=1):
            start = row * length + len(tokens)
            sources += [row * length + len(example.context) - 1, *range(start, start + len(answer) - 1)]
            targets += answer
            tokens += answer
            places += range(len(example.context), len(example.context) + len(answer))
            owners += [number] * len(answer)
        for table, values in ((ids, tokens), (positions, places), (branches, owners)):
            table[row, : len(values)] = torch.tensor(values)
    hidden = model.base_model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=_mask(branches, next(model.parameters()).dtype).to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    losses = token_losses(model, hidden[torch.tensor(sources, device=hidden.device)], torch.tensor(targets)).tolist()
    answers = iter(losses)
    return [[-math.fsum(next(answers) for _ in answer) for answer in example.answers] for example in examples]


def _mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores: 0 where a token sees another, else the least number there is.

    Args:
        branches: whose each token is: 0 context, 1.. the answers, -1 padding, shape (rows, length).
        dtype: of the model.

    Returns:
        shape (rows, 1, length, length): a token sees what stands before it in the context and in its own answer.
    """
    own = branches[:, :, None] == branches[:, None, :]
    seen = (own | (branches[:, None, :] == 0)).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _batches(examples: Sequence[EncodedExample], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices, the longest rows first, so that a batch holds rows of about one length and little padding."""
    order = sorted(range(len(examples)), key=lambda index: -examples[index].tokens)
    while order:
        size = max(1, tokens_per_batch // examples[order[0]].tokens)
        yield order[:size]
        order = order[size:]
