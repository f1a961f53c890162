"""Statistics of the consumers' inputs, from forward hooks on an ordinary call of the dense model.

All moments of a large model do not fit beside it, so sublayers are taken in groups, in order of depth, as many as the
memory limit admits; each group is one pass over the calibration windows that stops behind its last consumer. A small
model is one group: one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ffgym.pruning.statistics import GRADIENT_STATISTICS, INPUT_STATISTICS, Moments
from ffgym.types import LayerStats

OnProgress = Callable[[int, int], None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by position, by name."""


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Raised by a hook that has seen what it was waiting for."""


def arguments_of(module: nn.Module, run: Callable[[], object]) -> Arguments:
    """What ``run`` passes to a module that it calls; what comes from there on is not run."""
    found: list[Arguments] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


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
            sums = {}
            if len(part):
                sums = {i: Moments(consumers[i].in_features, needs, consumers[i].weight.device) for i in group}
                _pass(model, {i: consumers[i] for i in group}, sums, part, tokens_per_batch, advance)
            parts.append(sums)
        for index in group:
            first, second = (part_sums.pop(index).result() if part_sums else LayerStats() for part_sums in parts)
            yield index, first, second


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
    handles = [
        consumer.register_forward_pre_hook(lambda _, inputs, index=index: sums[index].update(inputs[0]))
        for index, consumer in consumers.items()
        if index != last
    ]
    try:
        with torch.inference_mode():
            for batch in torch.split(windows, max(1, tokens_per_batch // windows.shape[1])):
                ids = batch.to(model.get_input_embeddings().weight.device)
                (states, *_), _ = arguments_of(consumers[last], partial(model, input_ids=ids, use_cache=False))
                sums[last].update(states)
                advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()


def gradient_statistics(
    model: Any,
    consumers: Sequence[nn.Linear],
    windows: torch.Tensor,
    needs: frozenset[str],
    *,
    tokens_per_pass: int = 512,
    on_progress: OnProgress | None = None,
) -> list[LayerStats]:
    """First-order statistics of every consumer, from one backward pass a window.

    Args:
        model: dense causal LM in eval mode, its parameters frozen.
        consumers: the linears whose statistics are wanted.
        windows: token ids, shape (windows, length), int64.
        needs: any of ``gradient``, ``output_gradient``.
        tokens_per_pass: longer windows are cut into pieces of this length, to bound the activations held.
        on_progress: called with (passes done, passes).

    Returns:
        one ``LayerStats`` per consumer, float32 whatever the model's dtype; empty ones where nothing is needed.
    """
    if not needs & GRADIENT_STATISTICS:
        return [LayerStats() for _ in consumers]
    length = min(tokens_per_pass, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    weights = [torch.zeros_like(c.weight, dtype=torch.float32) if "gradient" in needs else None for c in consumers]
    fishers = [
        c.weight.new_zeros(c.out_features, c.out_features, dtype=torch.float32) if "output_gradient" in needs else None
        for c in consumers
    ]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def record(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[index], outputs[index] = args[0].detach(), output

        return record

    def start_graph(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(True)

    handles = [consumer.register_forward_hook(keep(index)) for index, consumer in enumerate(consumers)]
    handles.append(model.get_input_embeddings().register_forward_hook(start_graph))
    try:
        with torch.enable_grad():
            for done, piece in enumerate(pieces, start=1):
                ids = piece[None].to(model.get_input_embeddings().weight.device)
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss * (length - 1)
                gradients = torch.autograd.grad(loss, [outputs[index] for index in range(len(consumers))])
                for index, gradient in enumerate(gradients):
                    g = gradient.flatten(0, -2).float()
                    weight, fisher = weights[index], fishers[index]
                    if weight is not None:
                        weight.addmm_(g.T, inputs[index].flatten(0, -2).float())
                    if fisher is not None:
                        fisher.addmm_(g.T, g)
                if on_progress is not None:
                    on_progress(done, len(pieces))
    finally:
        for handle in handles:
            handle.remove()
    tokens = pieces.shape[0] * (length - 1)
    return [
        LayerStats(
            tokens=tokens,
            gradient=None if weight is None else weight / tokens,
            output_gradient=None if fisher is None else fisher / tokens,
        )
        for weight, fisher in zip(weights, fishers, strict=True)
    ]
