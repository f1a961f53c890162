"""Next-token loss on windows of text, without ever holding the logits of a whole window.

The last token of a window has no successor, so it is not projected to the vocabulary. The others are projected tile by
tile, each a part of the positions and of the vocabulary that is small enough to be summed while the caches hold it. The
logits stay in the model's dtype; sums and losses are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffgym.errors import ModelError
from ffgym.models.cut import PrunableModel
from ffgym.models.walk import Stream, Walk
from ffgym.types import Evaluation, OnShare, OnStep, do_nothing

TILE_ROWS = 2048
TILE_COLUMNS = 2048  # 16 MiB of float32: larger tiles are slower on a CPU, smaller ones hardly faster
LOGIT_TOLERANCE = 0.01  # of the largest logit, for what rounding does


@torch.inference_mode()
def evaluate(
    model: nn.Module, windows: torch.Tensor, *, tokens_per_batch: int = 4096, on_progress: OnStep = do_nothing
) -> Evaluation:
    """Mean loss of every window.

    Args:
        model: a Hugging Face causal LM in eval mode.
        windows: token ids, shape (windows, length), int64, length >= 2.
        tokens_per_batch: tokens in one forward pass (whole windows, at least one).
        on_progress: called with (windows done, windows).

    Returns:
        losses in nats per token, ``length - 1`` predicted tokens a window.
    """
    losses: list[float] = []
    for batch in torch.split(windows, max(1, tokens_per_batch // windows.shape[1])):
        losses.extend(window_losses(model, *predicting(model, batch)).tolist())
        on_progress(len(losses), len(windows))
    return Evaluation(tuple(losses), windows.shape[1] - 1)


@torch.inference_mode()
def check_logits(model: Any, ids: torch.Tensor) -> None:
    """Refuse a model that makes something else of its head's output than `project` knows, such as a scale.

    Args:
        model: a Hugging Face causal LM in eval mode, of any architecture.
        ids: some token ids, shape (length,), int64.

    Raises:
        ModelError: its losses would be wrong.
    """
    hidden, _ = predicting(model, ids[None])
    own = model(input_ids=ids[None].to(hidden.device), use_cache=False).logits[0, :-1].float()
    states = hidden[0].to(model.get_output_embeddings().weight.device)
    ours = project(model, states, states.new_empty(own.numel())).float().to(own.device)
    if (ours - own).abs().max() > LOGIT_TOLERANCE * own.abs().max():
        raise ModelError(
            f"a {type(model).__name__} changes the output of its head in a way that ffgym does not know, so that its"
            " loss would be wrong",
            hint="Measure it on tasks.",
        )


@torch.inference_mode()
def evaluate_cut(
    prunable: PrunableModel, windows: torch.Tensor, *, tokens_per_batch: int = 4096, on_progress: OnShare = do_nothing
) -> Evaluation:
    """As `evaluate`, layer by layer, for a model as it is cut now: its layers need not be in memory.

    Args:
        windows: token ids, shape (windows, length), int64, length >= 2. The hidden states of all are kept in memory.
        tokens_per_batch: tokens in one forward pass (whole windows, at least one).
        on_progress: called with the share that is done, from 0 to 1.
    """
    walk = Walk(prunable.model)
    stream = Stream(walk, torch.split(windows, max(1, tokens_per_batch // windows.shape[1])))
    depth, head = len(walk.layers), head_share(prunable.model)
    for index in range(depth):
        with prunable.layer(index):
            stream.step(index)
        on_progress((1 - head) * (index + 1) / depth)
    losses: list[float] = []
    for hidden, entry in zip(stream.hidden, stream.entries, strict=True):
        last = walk.leave(hidden, entry)
        losses.extend(window_losses(prunable.model, last[:, :-1], entry.ids[:, 1:].to(last.device)).tolist())
        on_progress(1 - head + head * len(losses) / len(windows))
    return Evaluation(tuple(losses), windows.shape[1] - 1)


def head_share(model: Any) -> float:
    """How much of a pass's products the output head takes: little in a large model, 0.6 in Gemma 3 270M."""
    head: int = model.get_output_embeddings().weight.numel()
    return head / (head + sum(weight.numel() for layer in Walk(model).layers for weight in layer.parameters()))


def window_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean loss of each window.

    Args:
        model: gives the output head.
        hidden: final hidden states that predict a token, shape (windows, length - 1, d).
        targets: those tokens, shape (windows, length - 1), int64.

    Returns:
        shape (windows,), float64, on the CPU, nats per token.
    """
    flat = token_losses(model, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    return flat.reshape(targets.shape).cpu().double().mean(dim=1)


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
    """Cross-entropy of each position, a tile of the logits at a time.

    Sums over the vocabulary are relative to the highest logit so far, so that nothing overflows.

    Args:
        model: gives the output head and, where its config names one, the soft cap of the logits.
        hidden: final hidden states, shape (tokens, d).
        targets: next tokens, shape (tokens,), int64.

    Returns:
        shape (tokens,), float32, nats.
    """
    head = model.get_output_embeddings()
    hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
    buffers = tuple(hidden.new_empty(TILE_ROWS * TILE_COLUMNS, dtype=dtype) for dtype in (hidden.dtype, torch.float32))
    parts = [
        _row_losses(model, states, wanted, *buffers)
        for states, wanted in zip(torch.split(hidden, TILE_ROWS), torch.split(targets, TILE_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _row_losses(
    model: Any, states: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor, wide: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of at most ``TILE_ROWS`` positions, shape (rows,), float32; the two buffers are overwritten."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    top = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
    total, chosen = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, vocabulary, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, vocabulary))
        logits = project(model, states, buffer, columns)
        if logits.dtype != torch.float32:
            logits = wide[: logits.numel()].view(logits.shape).copy_(logits)
        inside = (targets >= columns.start) & (targets < columns.stop)
        place = torch.where(inside, targets - columns.start, 0)
        chosen = torch.where(inside, logits.gather(1, place[:, None])[:, 0], chosen)
        before, top = top, torch.maximum(top, logits.amax(dim=1))
        total = total * (before - top).exp_() + logits.sub_(top[:, None]).exp_().sum(dim=1)
    return total.log_() + top - chosen


def project(model: Any, states: torch.Tensor, buffer: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
    """Logits of a few positions, scaled or soft-capped where the model's config says so.

    Args:
        model: gives the output head.
        states: final hidden states, shape (rows, d).
        buffer: at least as many numbers as there are logits, flat, the model's dtype; overwritten.
        columns: which tokens of the vocabulary.

    Returns:
        the first numbers of the buffer, shape (rows, columns).
    """
    head = model.get_output_embeddings()
    names = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    cap, divisor, factor = (getattr(model.config, name, None) for name in names)
    weight = head.weight[columns]
    logits = buffer[: len(states) * len(weight)].view(len(states), len(weight))
    torch.mm(states, weight.T, out=logits)
    if head.bias is not None:
        logits += head.bias[columns]
    if divisor is not None:  # Granite's; a pruned one has its inverse as ``logit_scale``, too
        logits.div_(divisor)
    elif factor is not None:  # Cohere's
        logits.mul_(factor)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits
