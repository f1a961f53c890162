"""Next-token loss on windows of text, without ever holding the logits of a whole window.

The last token of a window has no successor, so it is not projected to the vocabulary; the others are projected a few
hundred rows at a time. The logits stay in the model's dtype, sums and losses are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ffgym.types import Evaluation

LOGIT_BYTES = 96 * 2**20


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    tokens_per_batch: int = 4096,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Mean loss of every window.

    Args:
        model: a Hugging Face causal LM in eval mode.
        windows: token ids, shape (windows, length), int64, length >= 2.
        tokens_per_batch: tokens in one forward pass (whole windows, at least one).
        on_batch: called with the number of windows just done.

    Returns:
        losses in nats per token, ``length - 1`` predicted tokens a window.
    """
    losses: list[float] = []
    for batch in torch.split(windows, max(1, tokens_per_batch // windows.shape[1])):
        losses.extend(window_losses(model, batch).tolist())
        if on_batch is not None:
            on_batch(len(batch))
    return Evaluation(tuple(losses), windows.shape[1] - 1)


def window_losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss of each window in one forward pass; shape (windows,), float64, on the CPU."""
    hidden, targets = predicting(model, windows)
    flat = token_losses(model, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    return flat.reshape(targets.shape).double().mean(dim=1).cpu()


def predicting(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states that predict a token, and those tokens.

    Args:
        model: a Hugging Face causal LM in eval mode.
        windows: token ids, shape (windows, length), int64.

    Returns:
        hidden states, shape (windows, length - 1, d), the model's dtype; next tokens, shape (windows, length - 1).
    """
    ids = windows.to(model.get_input_embeddings().weight.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return hidden, ids[:, 1:].to(hidden.device)


def token_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position, a chunk of logits at a time.

    Args:
        model: gives the output head and, where its config names one, the soft cap of the logits.
        hidden: final hidden states, shape (tokens, d).
        targets: next tokens, shape (tokens,), int64.

    Returns:
        shape (tokens,), float32, nats.
    """
    head = model.get_output_embeddings()
    hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
    rows = rows_per_chunk(head, len(hidden))
    # Both buffers serve every chunk: fresh ones of this size cost more in page faults than the sums that fill them.
    logits_buffer = hidden.new_empty(rows, head.weight.shape[0])
    exponentials_buffer = logits_buffer.new_empty(logits_buffer.shape, dtype=torch.float32)
    parts: list[torch.Tensor] = []
    for states, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = project(model, states, logits_buffer)
        chosen = logits.gather(1, wanted[:, None])[:, 0].float()
        top = logits.amax(dim=1, keepdim=True).float()
        exponentials = exponentials_buffer[: len(states)].copy_(logits).sub_(top).exp_()
        parts.append(exponentials.sum(dim=1).log_() + top[:, 0] - chosen)
    return torch.cat(parts)


def rows_per_chunk(head: nn.Linear, tokens: int) -> int:
    """Positions whose logits are held at once."""
    return min(tokens, max(1, LOGIT_BYTES // (4 * head.weight.shape[0])))


def project(model: Any, states: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Logits of a few positions, soft-capped where the model's config names a cap.

    Args:
        model: gives the output head.
        states: final hidden states, shape (rows, d).
        buffer: shape (at least rows, vocabulary), the model's dtype; overwritten.

    Returns:
        its first rows, shape (rows, vocabulary).
    """
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = torch.mm(states, head.weight.T, out=buffer[: len(states)])
    if head.bias is not None:
        logits += head.bias
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits
