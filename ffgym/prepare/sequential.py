"""Calibrate a cut model layer by layer, on the outputs of the pruned layers before it (docs/mathematics.md).

Two streams of hidden states walk through one model: the dense one gives the targets, the pruned one the inputs. The
inputs of a refitted consumer are kept until its layer is done, so that nothing before it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ffgym.models.cut import PrunableModel
from ffgym.models.sublayer import PrunableSublayer
from ffgym.models.walk import Stream, Walk
from ffgym.prepare.statistics import inputs_handed_on, linear_input
from ffgym.pruning.calibration import sequential_refit
from ffgym.pruning.factors import as_factor, as_multiplied_, products_in
from ffgym.pruning.precision import in_float64, sum_in_float64
from ffgym.pruning.statistics import add_products_, mirror_, shifted
from ffgym.types import OnStep


@torch.no_grad()
def calibrate_sequentially(
    prunable: PrunableModel,
    kept: Sequence[int],
    windows: torch.Tensor,
    ridges: Sequence[float],
    *,
    tokens_per_batch: int = 4096,
    on_progress: OnStep | None = None,
) -> None:
    """Cut the model to ``kept`` and refit its consumers one after another; the model is left cut.

    Args:
        prunable: the prepared model, dense.
        kept: units per sublayer, length 2L.
        windows: calibration token ids, shape (windows, length), int64.
        ridges: lambda of each sublayer, length 2L.
        on_progress: called with (layers done, layers).
    """
    prunable.restore()
    walk = Walk(prunable.model)
    batches = torch.split(windows, max(1, tokens_per_batch // windows.shape[1]))
    dense, pruned = Stream(walk, batches), Stream(walk, batches)
    for index in range(len(walk.layers)):
        sublayers = 2 * index, 2 * index + 1
        with prunable.layer(index) as halves, ExitStack() as refitted:
            refittable = [half for half in halves if half.is_refittable]
            targets: list[list[torch.Tensor]] = [[] for _ in refittable]
            with inputs_handed_on(refittable, [to.append for to in targets]):
                dense.step(index)
            for half, sublayer in zip(halves, sublayers, strict=True):
                half.cut(kept[sublayer], calibrated=False)
                if not half.is_refittable:
                    continue
                inputs = [linear_input(half.consumer, run) for run in pruned.runs(index)] if kept[sublayer] else []
                _refit(half, targets.pop(0), inputs, kept[sublayer], ridges[sublayer])
                if inputs:
                    refitted.enter_context(half.resumed(inputs * 2))
            pruned.step(index)
        if on_progress is not None:
            on_progress(index + 1, len(walk.layers))
    prunable.kept = tuple(kept)


class _CrossMoments:
    """Means and covariances of dense inputs x (n channels) and pruned inputs y (k channels).

    As in ``Moments``, the first batch's means are subtracted before the float32 products; means are float64.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._shifts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._cross = self._products = torch.empty(0)
        self._sums: tuple[torch.Tensor | float, torch.Tensor | float] = (0.0, 0.0)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        dtype = x.dtype
        if self._shifts is None:
            self._shifts = x.flatten(0, -2).float().mean(dim=0), y.flatten(0, -2).float().mean(dim=0)
            n, k = x.shape[-1], y.shape[-1]
            self._cross, self._products = (torch.zeros(rows, k, device=x.device) for rows in (n, k))
        x, y = (as_multiplied_(shifted(each, shift), dtype) for each, shift in zip((x, y), self._shifts, strict=True))
        self._tokens += len(x)
        with products_in(dtype):
            self._cross.addmm_(x.T, y)
            add_products_(self._products, y)
        self._sums = self._sums[0] + sum_in_float64(x), self._sums[1] + sum_in_float64(y)

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """E[x], shape (n,), and E[y], (k,), float64; Cov[x, y], (n, k), and Cov[y], (k, k), for factors of n channels.

        Nothing can be added afterwards.
        """
        assert self._shifts is not None, "nothing was added"
        n = len(self._cross)
        moved = [torch.as_tensor(total) / self._tokens for total in self._sums]
        means = [in_float64(shift) + offset for shift, offset in zip(self._shifts, moved, strict=True)]
        cross, products = (as_factor(s, n).div_(self._tokens) for s in (self._cross, mirror_(self._products)))
        x, y = (each.to(cross) for each in moved)
        return means[0], means[1], cross.addr_(x, y, alpha=-1), products.addr_(y, y, alpha=-1)


def _refit(
    half: PrunableSublayer, targets: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], units: int, ridge: float
) -> None:
    weight, bias = half.dense_consumer
    if units == 0:
        if half.affine:
            tokens = sum(target[..., 0].numel() for target in targets)
            mean = (
                torch.stack([sum_in_float64(target.flatten(0, -2).float()) for target in targets]).sum(dim=0) / tokens
            )
            half.set_bias((0 if bias is None else in_float64(bias)) + in_float64(weight) @ mean)
        return
    sums = _CrossMoments()
    for target, given in zip(targets, inputs, strict=True):
        sums.update(target, given)
    x, y, cross, moment = sums.result()
    del sums  # float32 sums of the same size
    anchor = half.path.weight_at(moment.shape[0]) if half.path is not None else None
    if not half.affine:
        x, y = x.to(cross), y.to(cross)
        refit = sequential_refit(weight, cross.addr_(x, y), moment.addr_(y, y), ridge, anchor)
        half.set_consumer(refit, bias)
        return
    refit = sequential_refit(weight, cross, moment, ridge, anchor)
    moved = (0 if bias is None else in_float64(bias)) + in_float64(weight) @ x - in_float64(refit) @ y
    half.set_consumer(refit, moved)
