"""Calibrations: how a consumer is refitted after units were removed; the built-in ones, and the base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin

if TYPE_CHECKING:
    import torch

    from ffgym.pruning.calibration import ConsumerPath, NestedRidge


@dataclass(frozen=True)
class Consumer:
    """A consumer as a calibration sees it, its channels in path order: pruning keeps the first ones.

    Attributes:
        weight: dense W, shape (m, n), the model's dtype.
        bias: shape (m,), or ``None``.
        mean: E[x] of its inputs on the calibration text, shape (n,), float64 where the device has it.
        covariance: of its inputs, shape (n, n), float32.
        ridge: the strength that was chosen, relative to the mean of the second moment's diagonal.
        refit: the ridge refit for every level.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    mean: torch.Tensor
    covariance: torch.Tensor
    ridge: float
    refit: NestedRidge


class Calibration(Plugin, ABC):
    """How a consumer is refitted. Heuristics always see the ridge refit.

    Attributes:
        affine: the refit moves the consumer's bias too, giving one to consumers that have none.
        in_reward: whether episodes see the refit; otherwise they see plain removal.
    """

    kind = "calibration"
    affine: ClassVar[bool] = False
    in_reward: ClassVar[bool] = True

    @abstractmethod
    def path(self, consumer: Consumer) -> ConsumerPath:
        """Give a consumer its weights at every level; do not change ``consumer``."""


class Ridge(Calibration):
    """Nested ridge: the least output error for every level, from one factorisation."""

    name = "ridge"

    def path(self, consumer: Consumer) -> ConsumerPath:
        """The refit that every consumer has anyway."""
        return consumer.refit


class Affine(Ridge):
    """Nested ridge with a bias for every consumer."""

    name = "affine"
    affine = True


class NoCalibration(Ridge):
    """Plain removal in the reward; the final refits are ridge."""

    name = "none"
    in_reward = False


def calibration_class(name: str) -> type[Calibration]:
    """The class of that name; errors as in `manager.get_class`."""
    return cast("type[Calibration]", manager.get_class("calibration", name))


def has_ridge_path(calibration: type[Calibration]) -> bool:
    """Whether refits are those of `Ridge`. Others are their author's own, and nobody else could write them down."""
    return calibration.path is Ridge.path
