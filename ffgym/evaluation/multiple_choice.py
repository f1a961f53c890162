"""Multiple choice: which answer the model finds likeliest, by the summed log-likelihood of its tokens (``acc``).

All answers to a question share one row: first the context, then the answers. Each answer has the positions right after
the context and cannot see the other answers. The log-likelihoods are those of separate rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from ffgym.data.examples import EncodedExample
from ffgym.errors import ModelError
from ffgym.evaluation.perplexity import token_losses


def right_answers(examples: Sequence[EncodedExample], likelihoods: Sequence[Sequence[float]]) -> list[bool]:
    """Whether the right answer is the likeliest of each example.

    The first of equally likely answers counts, and none where a likelihood is not finite.
    """
    return [
        all(map(math.isfinite, found)) and max(range(len(found)), key=found.__getitem__) == example.right
        for example, found in zip(examples, likelihoods, strict=True)
    ]


def task_accuracy(examples: Sequence[EncodedExample], right: Sequence[bool]) -> float:
    """Mean over tasks of the share of their examples that were answered right, in [0, 1]."""
    tasks = sorted({example.task for example in examples})
    shares = [np.mean([r for e, r in zip(examples, right, strict=True) if e.task == task]) for task in tasks]
    return float(np.mean(shares))


@dataclass(frozen=True)
class PaddedExamples:
    """Examples as the rows of one forward pass."""

    examples: tuple[EncodedExample, ...]
    ids: torch.Tensor  # shape (examples, length), int64, 0 where padded
    positions: torch.Tensor  # of the tokens, shape (examples, length), int64
    mask: torch.Tensor  # what is added to attention scores, shape (examples, 1, length, length), the model's dtype
    sources: torch.Tensor  # where the answers' tokens are predicted, in the flattened hidden states
    targets: torch.Tensor  # those tokens

    def log_likelihoods(self, model: Any, hidden: torch.Tensor) -> list[list[float]]:
        """Log-likelihood of every answer of each example, in nats.

        Args:
            model: gives the output head.
            hidden: final hidden states, shape (examples, length, d).
        """
        found = token_losses(model, hidden.flatten(0, 1)[self.sources.to(hidden.device)], self.targets)
        losses = iter(found.tolist())
        return [[-math.fsum(next(losses) for _ in answer) for answer in example.answers] for example in self.examples]


def padded(model: Any, examples: Sequence[EncodedExample]) -> PaddedExamples:
    """Lay out examples for one forward pass.

    Raises:
        ModelError: an example is longer than the model's sliding window, which this mask does not know.
    """
    length = max(example.tokens for example in examples)
    window = getattr(model.config, "sliding_window", None)
    longest = max(len(example.context) + max(map(len, example.answers)) for example in examples)
    if window is not None and longest > window:
        raise ModelError(
            f"an example of {longest} tokens is longer than the model's sliding window of {window}",
            hint="Use tasks with shorter examples, or another reward.",
        )
    ids, positions, branches = torch.zeros(3, len(examples), length, dtype=torch.int64)
    branches -= 1  # padding is a branch of its own
    sources: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        context = len(example.context)
        parts = [range(context), *(range(context, context + len(answer)) for answer in example.answers)]
        tokens, places = [*example.context, *chain.from_iterable(example.answers)], [*chain.from_iterable(parts)]
        owners = [number for number, part in enumerate(parts) for _ in part]
        # The context's last token predicts the first one of every answer.
        before = (context - 1 if places[at] == context else at - 1 for at in range(context, len(tokens)))
        sources += [row * length + at for at in before]
        targets += tokens[context:]
        for table, values in ((ids, tokens), (positions, places), (branches, owners)):
            table[row, : len(values)] = torch.tensor(values)
    mask = _mask(branches, next(model.parameters()).dtype)
    return PaddedExamples(tuple(examples), ids, positions, mask, torch.tensor(sources), torch.tensor(targets))


def _mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores: 0 where a token sees another, else the least number there is.

    Args:
        branches: whose each token is: 0 context, 1.. the answers, -1 padding, shape (rows, length).
        dtype: of the model.

    Returns:
        shape (rows, 1, length, length): a token sees what comes before it in the context and in its own answer.
    """
    own = branches[:, :, None] == branches[:, None, :]
    seen = (own | (branches[:, None, :] == 0)).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def batches(examples: Sequence[EncodedExample], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices for each forward pass, longest rows first, because rows of similar length need little padding."""
    order = sorted(range(len(examples)), key=lambda index: -examples[index].tokens)
    while order:
        size = max(1, tokens_per_batch // examples[order[0]].tokens)
        yield order[:size]
        order = order[size:]
