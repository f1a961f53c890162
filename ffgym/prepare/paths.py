"""From a dense model and calibration text to pruning paths: statistics -> scores -> order -> permuted weights -> refit.

Sublayers are prepared one at a time, and each one's moment is released as soon as its path is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ffgym.data.cache import OTHER_CACHE, Scratch
from ffgym.errors import CalibrationError
from ffgym.files import writing
from ffgym.models.checkpoint import TensorFile
from ffgym.models.cut import PrunableModel
from ffgym.models.stream import LayerStream
from ffgym.models.sublayer import PrunableSublayer
from ffgym.plugins import manager
from ffgym.plugins.bases import Criterion
from ffgym.plugins.contracts import check_scores
from ffgym.prepare.calibrations import Calibration, Consumer
from ffgym.prepare.refits import path_of
from ffgym.prepare.statistics import gradient_statistics, stream_statistics
from ffgym.pruning.calibration import NestedRidge, pick_ridge, suffix_energy
from ffgym.pruning.ordering import expand_order, unit_order, unit_scores
from ffgym.pruning.precision import in_float64
from ffgym.pruning.statistics import GRADIENT_STATISTICS, InputMoments, Moments, require_finite
from ffgym.types import LayerStats, OnStep, SublayerView, do_nothing

HELD_OUT_SHARE = 0.25
HELD_OUT_TOKENS = 8192  # at most; their inputs are kept until the sublayer is prepared
HELD_OUT_ROWS = 1024  # of them choose lambda: on the demo model they choose as all 8,192 do, or within 0.1 % of it
GRADIENT_SHARE = 0.25  # a backward pass costs three forward ones, and first-order averages settle early


OnLayer = Callable[[Sequence[PrunableSublayer], Sequence[SublayerView], Sequence[float]], None]


@dataclass(frozen=True)
class Prepared:
    """A model whose units are in path order, with a refit for every level."""

    prunable: PrunableModel
    # what heuristics see of each sublayer; read one at a time where the model is not in memory
    views: Sequence[SublayerView]
    ridges: tuple[float, ...]  # the lambda of each sublayer; 0 of experts, which no refit follows
    store: Path | None = None  # the folder that it can be opened from again; None where it was not stored
    key: str = ""  # of the store that it has or would have; empty where nobody asked for it
    weights: str = ""  # digest of the dense model's weights; empty where nobody asked for it


def prepare(
    model: Any,
    criterion: Criterion,
    windows: torch.Tensor,
    *,
    calibration: str = "ridge",
    ridge: float | None = None,
    keep: frozenset[str] = frozenset(),
    tokens_per_batch: int = 4096,
    source: LayerStream | None = None,
    on_layer: OnLayer = do_nothing,
    on_progress: OnStep = do_nothing,
) -> Prepared:
    """Collect statistics, score, order, permute and factorise.

    Args:
        model: dense Hugging Face causal LM; its weights are permuted in place.
        windows: calibration token ids, shape (windows, length), int64.
        calibration: name of the plugin that refits consumers. ``affine`` refits the consumer's bias too, giving one to
            consumers that have none; ``ridge`` does so only where there is a bias; ``none`` builds the ridge path all
            the same (final tables show it).
        ridge: lambda; ``None`` picks it per sublayer on held-out calibration windows.
        keep: statistics to keep for heuristics beyond the preparation.
        source: where the model's layers come from if they are on the meta device. What is prepared of a layer is then
            released with it, so ``on_layer`` has to store it, and the result holds no views.
        on_layer: called with the halves of a layer, their views and lambdas, when it is prepared.
        on_progress: called with (steps done, steps): sublayers, twice where there is a walk backwards.

    Raises:
        PluginError: the criterion or the calibration broke its contract.
        CalibrationError: statistics that are not finite, a moment that cannot be factorised, or too few windows to hold
            some out.
    """
    prunable, calibrates = PrunableModel(model, source), manager.create("calibration", calibration)
    if ridge is None and len(windows) < 2:
        raise CalibrationError(
            "choosing the ridge needs at least 2 calibration windows",
            hint="Raise data.calibration_tokens, or set prune.ridge to a number such as 0.01.",
        )
    needs, done = criterion.needs | keep, itertools.count(1)
    steps = len(prunable.halves) * (2 if needs & GRADIENT_STATISTICS else 1)

    sample = windows[: max(1, int(GRADIENT_SHARE * len(windows)))]
    gradients = _Gradients(source)
    for index, stats in gradient_statistics(prunable, sample, needs):
        gradients.add(index, stats)
        on_progress(next(done), steps)
    held_out = 0 if ridge is not None else held_out_windows(*windows.shape)
    stream = stream_statistics(prunable, windows, held_out=held_out, tokens_per_batch=tokens_per_batch)
    views: list[SublayerView] = []
    ridges: list[float] = []
    for index, sums, apart in stream:
        half = prunable.halves[index]
        half.affine = half.is_refittable and (calibrates.affine or half.consumer.bias is not None)
        try:
            chosen, view = _build_path(
                half, criterion, calibrates, sums, gradients.pop(index), apart, ridge, keep, tokens_per_batch
            )
        except CalibrationError as error:  # the mathematics does not know the sublayer's name
            raise CalibrationError(f"{half.sublayer.name}: {error.message}", hint=error.hint) from error
        ridges.append(chosen)
        views.append(view)
        if half.sublayer.kind != "attention":
            on_layer(prunable.halves[index - 1 : index + 1], views[-2:], ridges[-2:])
            if source is not None:
                views.clear()
        del sums, apart, view  # before the moments of the next layer are collected
        on_progress(next(done), steps)
    return Prepared(prunable, tuple(views), tuple(ridges))


class _Gradients:
    """First-order statistics of all sublayers until their turn comes: in memory, or in temporary files of the cache."""

    def __init__(self, source: LayerStream | None) -> None:
        self._source = source
        self._stats: dict[int, LayerStats] = {}

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch("tensors")

    def add(self, index: int, stats: LayerStats) -> None:
        """Keep those of a sublayer; raises ``OutputError`` where they cannot be written."""
        if self._source is not None:
            file = self._scratch.folder / str(index)
            found = {name: getattr(stats, name) for name in GRADIENT_STATISTICS}
            with writing(file, OTHER_CACHE):
                save_file({name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}, file)
            stats = LayerStats(stats.tokens)
        self._stats[index] = stats

    def pop(self, index: int) -> LayerStats:
        """Those of a sublayer, once; empty ones where there are none."""
        stats = self._stats.pop(index, LayerStats())
        if self._source is None or not stats.tokens:
            return stats
        file = TensorFile(self._scratch.folder / str(index))
        stored: dict[str, Any] = {name: file.read(name).to(self._source.device) for name in file.names}
        return LayerStats(stats.tokens, **stored)


def _build_path(
    half: PrunableSublayer,
    criterion: Criterion,
    calibration: Calibration,
    sums: Moments,
    gradients: LayerStats,
    apart: torch.Tensor | None,
    ridge: float | None,
    keep: frozenset[str],
    tokens_per_batch: int,
) -> tuple[float, SublayerView]:
    """Score and order a sublayer's units, permute its weights, and factorise: its lambda, and what heuristics see.

    Args:
        half: the sublayer, dense; its path is set.
        sums: of the fitted windows. The held-out ones are added, and the moments take the memory of the sums.
        apart: inputs of the held-out windows, shape (tokens, n); ``None`` where lambda is given.
        ridge: lambda; ``None`` picks it.
        tokens_per_batch: so many of the held-out inputs are added at once.
    """
    fitted = None
    if apart is not None:
        fitted = sums.result()
        for part in torch.split(apart, tokens_per_batch):
            sums.update(part)
    moments = sums.take()
    require_finite(moments, gradients)
    scores = _score(criterion, half, _stats(moments, gradients, criterion.needs))
    order = unit_order(scores).cpu()  # scores and statistics may live elsewhere than the weights; this fits anywhere
    columns = expand_order(order, half.sublayer.channels_per_unit)
    half.permute(order)
    if not half.is_refittable:
        moments = moments.reorder(columns)
        squares = in_float64(moments.covariance.diagonal()) + moments.mean**2
        lost = suffix_energy(in_float64(half.consumer.weight.detach()[0]) ** 2 * squares)
        stats = _stats(moments, gradients, keep)
        return 0.0, view_of(half, scores[order], stats, lost, float(lost[0]))
    weight, bias = half.consumer.weight.detach(), half.consumer.bias
    if ridge is None:
        assert fitted is not None, "windows were held out"
        assert apart is not None
        fitted = fitted.reorder(columns)
        mean = fitted.mean if half.affine else None
        ridge = pick_ridge(weight, fitted.moment(centred=half.affine), some_rows(apart)[:, columns], mean)
        del fitted
    moments = moments.reorder(columns)
    if gradients.gradient is not None:
        gradients = replace(gradients, gradient=gradients.gradient[:, columns])
    mean = moments.mean if half.affine else None
    refit = NestedRidge(weight, moments.moment(centred=half.affine), ridge, mean, bias)
    consumer = Consumer(weight, bias, moments.mean, moments.covariance, ridge, refit)
    half.path = path_of(calibration, consumer, half.sublayer.name)
    energy = _output_energy(weight, moments, ridge, refit.removal_error, centred=half.affine)
    stats = _stats(moments, gradients, keep)
    return ridge, view_of(half, scores[order], stats, refit.removal_error, energy, refit)


def _stats(moments: InputMoments, gradients: LayerStats, names: frozenset[str]) -> LayerStats:
    """The named statistics."""
    return replace(
        moments.stats(names),
        gradient=gradients.gradient if "gradient" in names else None,
        output_gradient=gradients.output_gradient if "output_gradient" in names else None,
    )


def _score(criterion: Criterion, half: PrunableSublayer, stats: LayerStats) -> torch.Tensor:
    weight = half.consumer.weight.detach().float()
    block = half.sublayer.channels_per_unit
    scores = check_scores(criterion, weight, replace(stats, channels_per_unit=block), half.sublayer)
    return unit_scores(scores, block)


def held_out_windows(windows: int, length: int) -> int:
    """How many of the windows choose lambda."""
    return max(1, min(int(HELD_OUT_SHARE * windows), HELD_OUT_TOKENS // length))


def some_rows(inputs: torch.Tensor) -> torch.Tensor:
    """A random choice of inputs, shape (at most ``HELD_OUT_ROWS``, n), the same for the same number of tokens."""
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:HELD_OUT_ROWS]
    return inputs[chosen.sort().values.to(inputs.device)]


def _output_energy(
    weight: torch.Tensor, moments: InputMoments, ridge: float, removal_error: torch.Tensor, *, centred: bool
) -> float:
    """E||W x||^2 of a consumer's dense weight, shape (m, n): the error without any channel, less its ridge term."""
    squares = in_float64(moments.covariance.diagonal())
    if not centred:
        squares = squares + moments.mean**2
    penalty = ridge * squares.mean() * in_float64(weight.float().square().sum(dim=0)).sum()
    energy = removal_error[0].to(penalty) - penalty
    if centred:
        energy += (in_float64(weight) @ moments.mean).square().sum()
    return float(energy)


def view_of(
    half: PrunableSublayer,
    scores: torch.Tensor,
    stats: LayerStats,
    removal_error: torch.Tensor,
    energy: float,
    refit: NestedRidge | None = None,
) -> SublayerView:
    """What heuristics see of a sublayer in path order.

    Args:
        removal_error: for every channel that may be the first to go, shape (n + 1,).
        energy: E||W x||^2.
        refit: for the second-order estimate, where its statistics are there.
    """
    fisher, step = stats.output_gradient, half.sublayer.channels_per_unit
    return SublayerView(
        sublayer=half.sublayer,
        weight=half.consumer.weight.detach(),
        stats=stats,
        unit_scores=scores,
        removal_error=removal_error[::step].cpu().numpy(),
        output_energy=energy,
        loss_increase=None if fisher is None or refit is None else refit.loss_increase(fisher)[::step].cpu().numpy(),
    )
