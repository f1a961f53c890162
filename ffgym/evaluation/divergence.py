"""Kullback-Leibler divergence from the dense model, without ever holding the logits of a whole window.

The dense model's logits of all search text would be gigabytes. Its final hidden states are a few hundred numbers a
token, and pruning does not change the output head. So the hidden states are kept, and the head is applied to them
again, a few hundred positions at a time, together with those of the pruned model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import kl_div

from ffgym.evaluation.perplexity import project
from ffgym.models.walk import Objective

LOGIT_BYTES = 96 * 2**20  # all buffers together
BUFFERS = 3  # float32 numbers held per logit


def window_divergences(
    model: Any, hidden: torch.Tensor, dense_hidden: torch.Tensor, targets: torch.Tensor, needs: frozenset[str]
) -> torch.Tensor:
    """Mean loss, KL(P || Q) and KL(Q || P) of each window, P from the dense hidden states, Q from the others.

    Args:
        model: gives the output head that both go through.
        hidden: final hidden states that predict a token, shape (windows, length - 1, d).
        dense_hidden: the dense model's, same shape.
        targets: the tokens, shape (windows, length - 1), int64.
        needs: ``kl``, ``reverse_kl`` or both: which direction to measure.

    Returns:
        shape (3, windows), float64, on the CPU, nats per token; NaN in the row of a direction that was not asked for.
    """
    head = model.get_output_embeddings().weight
    states, dense_states = (part.to(head.device).flatten(0, 1) for part in (hidden, dense_hidden))
    following = targets.to(head.device).flatten()
    vocabulary = head.shape[0]
    rows = min(len(states), max(1, LOGIT_BYTES // (4 * BUFFERS * vocabulary)))
    logits_buffer = states.new_empty(rows * vocabulary)
    log_p, log_q, work = (states.new_empty(rows, vocabulary, dtype=torch.float32) for _ in range(BUFFERS))
    result = states.new_full((3, len(states)), torch.nan, dtype=torch.float32)
    for start in range(0, len(states), rows):
        here = slice(start, min(start + rows, len(states)))
        count = here.stop - here.start
        p, q, spare = log_p[:count], log_q[:count], work[:count]
        _log_softmax(project(model, dense_states[here], logits_buffer), p, spare)
        _log_softmax(project(model, states[here], logits_buffer), q, spare)
        result[0, here] = -q.gather(1, following[here, None])[:, 0]
        torch.exp(p, out=spare)
        # Term by term: the difference of two sums over the vocabulary would lose a small divergence in rounding.
        difference = p.sub_(q)
        if "kl" in needs:
            result[1, here] = spare.mul_(difference).sum(dim=1).clamp_min_(0)
        if "reverse_kl" in needs:
            torch.exp(q, out=spare)
            result[2, here] = spare.mul_(difference).sum(dim=1).neg_().clamp_min_(0)
    return result.view(3, *targets.shape).cpu().double().mean(dim=2)


def divergence_from(model: Any, dense_hidden: torch.Tensor, name: str) -> Objective:
    """The divergence of a window, to take the gradient of.

    Args:
        dense_hidden: the dense model's final hidden states that predict a token, shape (length - 1, d).
        name: ``kl`` or ``reverse_kl``.
    """

    def summed(here: slice, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states = dense_hidden[here].to(model.get_output_embeddings().weight.device)
            log_p = project(model, states, states.new_empty(logits.numel())).to(logits).log_softmax(dim=-1)
        log_q = logits[0].log_softmax(dim=-1)
        pair = (log_q, log_p) if name == "kl" else (log_p, log_q)
        return kl_div(*pair, reduction="sum", log_target=True)

    return summed


def _log_softmax(logits: torch.Tensor, out: torch.Tensor, work: torch.Tensor) -> None:
    out.copy_(logits).sub_(logits.amax(dim=1, keepdim=True).float())
    torch.exp(out, out=work)
    out.sub_(work.sum(dim=1, keepdim=True).log_())
