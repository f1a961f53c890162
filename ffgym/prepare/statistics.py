"""Statistics of the consumers' inputs and outputs, on a walk through the dense model.

Layer by layer: hidden states of all windows are carried on, and the moments of one layer are held at a time. So one
pass serves a model of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from ffgym.errors import ModelError
from ffgym.models.cut import PrunableModel
from ffgym.models.sublayer import PrunableSublayer
from ffgym.models.walk import Stream, Walk, all_states, walk_back
from ffgym.pruning.statistics import GRADIENT_STATISTICS, Moments, add_products_, mirror_
from ffgym.types import LayerStats

PIECE_TOKENS = 512  # longer windows are cut into pieces, to bound the graph of a layer


@contextmanager
def inputs_handed_on(
    halves: Sequence[PrunableSublayer], receive: Sequence[Callable[[torch.Tensor], None]]
) -> Iterator[None]:
    """Within it, whatever the consumer of each half is given is passed to its receiver too."""
    with ExitStack() as hooks:
        for half, to in zip(halves, receive, strict=True):
            hooks.enter_context(half.watch(to))
        yield


def stream_statistics(
    prunable: PrunableModel,
    windows: torch.Tensor,
    *,
    held_out: int = 0,
    tokens_per_batch: int = 4096,
) -> Iterator[tuple[int, Moments, torch.Tensor | None]]:
    """Yield each consumer's statistics, first to last, without keeping them.

    Units may be permuted as soon as the statistics of their consumer are there: no layer is run again. A layer stays in
    memory until the next one is asked for.

    Args:
        prunable: dense, in eval mode.
        windows: calibration token ids, shape (windows, length), int64. The hidden states of all are kept in memory.
        held_out: how many of the last windows to hold out (for choosing the ridge).

    Yields:
        (index, sums over the first windows, inputs of the held-out windows, if any: shape (tokens, n), the model's
        dtype).
    """
    walk, size = Walk(prunable.model), max(1, tokens_per_batch // windows.shape[1])
    fitted, apart = windows[: len(windows) - held_out], windows[len(windows) - held_out :]
    with torch.inference_mode():
        first, second = (Stream(walk, torch.split(part, size) if len(part) else ()) for part in (fitted, apart))
    for layer in range(len(walk.layers)):
        with prunable.layer(layer) as halves:
            sums = [Moments(half.consumer.in_features, half.consumer.weight.device) for half in halves]
            inputs: list[list[torch.Tensor]] = [[] for _ in halves]
            with torch.inference_mode(), inputs_handed_on(halves, [to.update for to in sums]):
                first.step(layer)
            with torch.inference_mode(), inputs_handed_on(halves, [to.append for to in inputs]):
                second.step(layer)
            for index in (2 * layer, 2 * layer + 1):
                batches = inputs.pop(0)
                rows = torch.cat([batch.flatten(0, -2) for batch in batches]) if batches else None
                yield index, sums.pop(0), rows


def gradient_statistics(
    prunable: PrunableModel,
    windows: torch.Tensor,
    needs: frozenset[str],
) -> Iterator[tuple[int, LayerStats]]:
    """Yield the first-order statistics of the consumers, from one walk backwards, without keeping them.

    Args:
        prunable: dense, in eval mode, its parameters frozen.
        windows: token ids, shape (windows, length), int64.
        needs: any of ``gradient``, ``output_gradient``.

    Yields:
        (index, statistics) of each consumer, float32, the last layer's first; nothing where nothing is needed.
    """
    if not needs & GRADIENT_STATISTICS:
        return
    if experts := next((half.sublayer for half in prunable.halves if not half.is_refittable), None):
        raise ModelError(
            f"{experts.name} has no {' and '.join(sorted(needs & GRADIENT_STATISTICS))}, which the criterion or a"
            " heuristic needs",
            hint="With mixtures of experts, use --criterion wanda and --prior mlp-first.",
        )
    length = min(PIECE_TOKENS, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    sums: list[_FirstOrder] = []

    @contextmanager
    def layer(index: int) -> Iterator[None]:
        with prunable.layer(index) as halves, ExitStack() as hooks:
            sums[:] = [_FirstOrder(half.consumer, needs) for half in halves]
            for half, to in zip(halves, sums, strict=True):
                hooks.enter_context(half.consumer.register_forward_hook(to.record))
            yield

    with torch.no_grad():
        stream = Stream(Walk(prunable.model), torch.split(pieces, 1))
    states, tokens = all_states(stream, layer), pieces.shape[0] * (length - 1)
    walked = walk_back(stream, states, lambda _: [to.output for to in sums], scale=length - 1, layer=layer)
    for done, (index, gradients) in enumerate(walked, start=1):
        for to, gradient in zip(sums, gradients, strict=True):
            to.update(gradient)
        if done % len(pieces) == 0:
            for sublayer in (2 * index + 1, 2 * index):
                yield sublayer, sums.pop().result(tokens)


class _FirstOrder:
    """Sums of g x^T and g g^T over tokens: x is what a consumer is given, g the loss's gradient at its output."""

    def __init__(self, consumer: nn.Linear, needs: frozenset[str]) -> None:
        outputs, inputs = consumer.weight.shape
        zeros = partial(torch.zeros, dtype=torch.float32, device=consumer.weight.device)
        self._weight = zeros((outputs, inputs)) if "gradient" in needs else None
        self._fisher = zeros((outputs, outputs)) if "output_gradient" in needs else None
        self._inputs = self.output = torch.empty(0)

    def record(self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A forward hook."""
        self._inputs, self.output = args[0].detach(), output

    def update(self, gradient: torch.Tensor) -> None:
        """Add the tokens that were recorded last."""
        g = gradient.flatten(0, -2).float()
        if self._weight is not None:
            self._weight.addmm_(g.T, self._inputs.flatten(0, -2).float())
        if self._fisher is not None:
            add_products_(self._fisher, g)
        self._inputs = self.output = torch.empty(0)  # the graph of the layer goes

    def result(self, tokens: int) -> LayerStats:
        """Averages."""
        return LayerStats(
            tokens=tokens,
            gradient=None if self._weight is None else self._weight / tokens,
            output_gradient=None if self._fisher is None else mirror_(self._fisher / tokens),
        )
