"""Statistics of the consumers' inputs, from forward hooks on an ordinary call of the dense model.

All moments of a large model do not fit beside it, so sublayers are taken in groups, in order of depth, as many as the
memory limit admits; each group is one pass over the calibration windows that stops behind its last consumer. A small
model is one group: one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ffgym.pruning.statistics import INPUT_STATISTICS, Moments
from ffgym.types import LayerStats

OnProgress = Callable[[int, int], None]


class _BehindLastConsumer(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Raised by the last hook of a group: what lies deeper is not needed."""


def stream_statistics(
    model: nn.Module,
    consumers: Sequence[nn.Linear],
    windows: torch.Tensor,
    needs: frozenset[str],
    *,
    held_out: int = 0,
    memory: int = 4 * 2**30,
    tokens_per_batch: int = 4096,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[int, LayerStats, LayerStats]]:
    """Yield each consumer's statistics, first to last; what was yielded is no longer held here.

    Args:
        model: dense causal LM in eval mode.
        consumers: its 2L consumers, in order of depth.
        windows: calibration token ids, shape (windows, length), int64.
        needs: any of ``mean``, ``square``, ``second_moment``.
        held_out: how many of the last windows to keep apart (for choosing the ridge).
        memory: bytes that the sums of one group may take.
        tokens_per_batch: tokens of one forward pass.
        on_progress: called with (windows done, windows in all passes).

    Yields:
        (index, statistics of the first windows, statistics of the held-out windows).
    """
    needs = needs & INPUT_STATISTICS
    if not needs:
        for index in range(len(consumers)):
            yield index, LayerStats(), LayerStats()
        return
    groups = list(_groups(consumers, needs, memory, 2 if held_out else 1))
    fitted, apart = windows[: len(windows) - held_out], windows[len(windows) - held_out :]
    done, total = 0, len(groups) * len(windows)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for group in groups:
        parts = []
        for part in (fitted, apart):
            sums = {i: Moments(consumers[i].in_features, needs, consumers[i].weight.device) for i in group}
            if len(part):
                _pass(model, {i: consumers[i] for i in group}, sums, part, tokens_per_batch, advance)
            parts.append(sums)
        for index in group:
            yield index, parts[0].pop(index).result(), parts[1].pop(index).result()


def _groups(consumers: Sequence[nn.Linear], needs: frozenset[str], memory: int, copies: int) -> Iterator[list[int]]:
    group: list[int] = []
    held = 0
    for index, consumer in enumerate(consumers):
        size = copies * 4 * consumer.in_features * (consumer.in_features if "second_moment" in needs else 4)
        if group and held + size > memory:
            yield group
            group, held = [], 0
        group.append(index)
        held += size
    yield group


def _pass(
    model: Any,
    consumers: dict[int, nn.Linear],
    sums: dict[int, Moments],
    windows: torch.Tensor,
    tokens_per_batch: int,
    advance: Callable[[int], None],
) -> None:
    last = max(consumers)

    def hook(index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[index].update(inputs[0])
            if index == last:
                raise _BehindLastConsumer

        return record

    handles = [consumer.register_forward_pre_hook(hook(index)) for index, consumer in consumers.items()]
    try:
        with torch.inference_mode():
            for batch in windows.split(max(1, tokens_per_batch // windows.shape[1])):
                try:
                    model(input_ids=batch.to(model.get_input_embeddings().weight.device), use_cache=False)
                except _BehindLastConsumer:
                    advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()


def weight_gradients(
    model: Any,
    consumers: Sequence[nn.Linear],
    windows: torch.Tensor,
    *,
    on_progress: OnProgress | None = None,
) -> list[torch.Tensor]:
    """dL/dW of every consumer, L the mean token loss (nats) over the windows; first-order criteria read it.

    Args:
        model: dense causal LM in eval mode.
        consumers: the linears whose gradients are wanted.
        windows: token ids, shape (windows, length), int64.
        on_progress: called with (windows done, windows).

    Returns:
        one float32 tensor per consumer, its weight's shape. Sums are float32 even where the model is bfloat16.
    """
    sums = [torch.zeros(c.weight.shape, dtype=torch.float32, device=c.weight.device) for c in consumers]
    wanted = [consumer.weight.requires_grad for consumer in consumers]
    for consumer in consumers:
        consumer.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for done, window in enumerate(windows, start=1):
                ids = window[None].to(model.get_input_embeddings().weight.device)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                gradients = torch.autograd.grad(loss, [consumer.weight for consumer in consumers])
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient.float() / len(windows)
                if on_progress is not None:
                    on_progress(done, len(windows))
    finally:
        for consumer, was in zip(consumers, wanted, strict=True):
            consumer.weight.requires_grad_(was)
    return sums
