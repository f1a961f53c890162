"""From a dense model and calibration text to pruning paths: statistics -> scores -> order -> permuted weights -> refit.

Sublayers stream through one at a time, and each one's moment is released as soon as its path is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ffgym.errors import CalibrationError
from ffgym.models.cut import PrunableModel, PrunableSublayer
from ffgym.plugins.bases import Criterion
from ffgym.plugins.contracts import check_scores
from ffgym.prepare.statistics import OnProgress, gradient_statistics, stream_statistics
from ffgym.pruning.calibration import NestedRidge, covariance, pick_ridge
from ffgym.pruning.ordering import channel_scores, expand_order, unit_order, unit_scores
from ffgym.pruning.statistics import GRADIENT_STATISTICS, INPUT_STATISTICS, merge, require_finite
from ffgym.types import Calibration, LayerStats, SublayerView

HELD_OUT_SHARE = 0.25
GRADIENT_SHARE = 0.25  # a backward pass costs three forward ones, and first-order averages settle early


@dataclass(frozen=True)
class Prepared:
    """A model whose units stand in path order, with a refit for every level.

    Attributes:
        prunable: the model, ready to be cut.
        views: what heuristics see of each sublayer.
        ridges: the lambda of each sublayer.
        calibration_tokens: tokens that the statistics run over.
    """

    prunable: PrunableModel
    views: tuple[SublayerView, ...]
    ridges: tuple[float, ...]
    calibration_tokens: int


def prepare(
    model: Any,
    criterion: Criterion,
    windows: torch.Tensor,
    *,
    calibration: Calibration = "ridge",
    ridge: float | None = None,
    keep: frozenset[str] = frozenset(),
    tokens_per_batch: int = 4096,
    on_progress: OnProgress | None = None,
) -> Prepared:
    """Collect statistics, score, order, permute and factorise.

    Args:
        model: dense Hugging Face causal LM; its weights are permuted in place.
        criterion: scores the channels.
        windows: calibration token ids, shape (windows, length), int64.
        calibration: ``affine`` refits the consumer's bias too, giving one to consumers that have none; ``ridge`` does
            so only where there is a bias; ``none`` builds the ridge path all the same (final tables show it).
        ridge: lambda; ``None`` picks it per sublayer on held-out calibration windows.
        keep: statistics to keep for heuristics beyond the preparation.
        tokens_per_batch: tokens of one forward pass.
        on_progress: called with (steps done, steps): layers of a walk backwards where there is one, then sublayers.

    Raises:
        PluginError: the criterion broke its contract.
        CalibrationError: statistics that are not finite, a moment that cannot be factorised, or too few windows to hold
            some out.
    """
    prunable = PrunableModel(model)
    if ridge is None and len(windows) < 2:
        raise CalibrationError(
            "choosing the ridge needs at least 2 calibration windows",
            hint="Raise data.calibration_tokens, or set prune.ridge to a number such as 0.01.",
        )
    done, steps = Counter[str](), Counter[str](sublayers=len(prunable.halves))

    def counted(kind: str) -> OnProgress:
        def advance(so_far: int, in_all: int) -> None:
            done[kind], steps[kind] = so_far, in_all
            if on_progress is not None:
                on_progress(done.total(), steps.total())

        return advance

    held_out = 0 if ridge is not None else max(1, int(HELD_OUT_SHARE * len(windows)))
    needs = criterion.needs | keep
    sample = windows[: max(1, int(GRADIENT_SHARE * len(windows)))]
    first_order = gradient_statistics(model, prunable.consumers, sample, needs, on_progress=counted("layers"))
    affine = [calibration == "affine" or half.consumer.bias is not None for half in prunable.halves]
    needs = needs | {"second_moment"} | ({"mean"} if any(affine) else frozenset())
    stream = stream_statistics(
        model,
        prunable.consumers,
        windows,
        needs,
        held_out=held_out,
        tokens_per_batch=tokens_per_batch,
    )
    ordered = counted("sublayers")
    views: list[SublayerView] = []
    ridges: list[float] = []
    for index, fit, apart in stream:
        half = prunable.halves[index]
        with _naming(half):
            require_finite(fit, apart, first_order[index])
        scores = _score(criterion, half, _with_gradients(merge(fit, apart), first_order[index]))
        order = unit_order(scores)
        columns = expand_order(order, half.sublayer.channels_per_unit)
        half.permute(order)
        fit, apart = reorder(fit, columns), reorder(apart, columns)
        gradients = reorder(first_order[index], columns)
        with _naming(half):
            chosen = ridge if ridge is not None else _pick(half, fit, apart, affine[index])
            stats = _with_gradients(merge(fit, apart), gradients)
            half.path = path = _refit(half, stats, chosen, affine[index])
            half.affine = affine[index]
        ridges.append(chosen)
        views.append(_view(half, scores[order], stats, path, keep))
        ordered(len(views), len(prunable.halves))
    return Prepared(prunable, tuple(views), tuple(ridges), windows.numel())


def reorder(stats: LayerStats, columns: torch.Tensor) -> LayerStats:
    """The same statistics with channels in another order.

    Args:
        stats: of n channels.
        columns: shape (n,), int64.
    """
    second = stats.second_moment
    return replace(
        stats,
        mean=None if stats.mean is None else stats.mean[columns],
        square=None if stats.square is None else stats.square[columns],
        second_moment=None if second is None else second[columns][:, columns],
        gradient=None if stats.gradient is None else stats.gradient[:, columns],
    )


def _score(criterion: Criterion, half: PrunableSublayer, stats: LayerStats) -> torch.Tensor:
    weight = half.consumer.weight.detach().float()
    scores = check_scores(criterion, weight, _only(stats, criterion.needs), half.sublayer)
    return unit_scores(channel_scores(scores), half.sublayer.channels_per_unit)


def _pick(half: PrunableSublayer, fit: LayerStats, apart: LayerStats, affine: bool) -> float:
    assert fit.second_moment is not None, "collected above"
    assert apart.second_moment is not None, "collected above"
    return pick_ridge(
        half.consumer.weight.detach(),
        covariance(fit.second_moment, fit.mean if affine else None),
        covariance(apart.second_moment, apart.mean if affine else None),
    )


def _refit(half: PrunableSublayer, stats: LayerStats, ridge: float, affine: bool) -> NestedRidge:
    assert stats.second_moment is not None, "collected above"
    consumer = half.consumer
    return NestedRidge(
        consumer.weight.detach(), stats.second_moment, ridge, stats.mean if affine else None, consumer.bias
    )


def _view(
    half: PrunableSublayer, scores: torch.Tensor, stats: LayerStats, path: NestedRidge, keep: frozenset[str]
) -> SublayerView:
    weight = half.consumer.weight.detach()
    assert stats.second_moment is not None, "collected above"
    W = weight.float()
    step = half.sublayer.channels_per_unit
    fisher = stats.output_gradient
    return SublayerView(
        sublayer=half.sublayer,
        weight=weight,
        stats=_only(stats, keep),
        unit_scores=scores,
        removal_error=path.removal_error[::step].cpu().numpy(),
        output_energy=float(((W @ stats.second_moment) * W).sum()),
        loss_increase=None if fisher is None else path.loss_increase(fisher)[::step].cpu().numpy(),
    )


def _with_gradients(stats: LayerStats, first_order: LayerStats) -> LayerStats:
    return replace(stats, gradient=first_order.gradient, output_gradient=first_order.output_gradient)


def _only(stats: LayerStats, names: frozenset[str]) -> LayerStats:
    dropped: dict[str, Any] = dict.fromkeys((INPUT_STATISTICS | GRADIENT_STATISTICS) - names)
    return replace(stats, **dropped)


@contextmanager
def _naming(half: PrunableSublayer) -> Iterator[None]:
    """Add the sublayer's name to errors from the mathematics, which knows none."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{half.sublayer.name}: {error.message}", hint=error.hint) from error
