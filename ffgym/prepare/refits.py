"""Lets a calibration refit a consumer, and checks that what it returns keeps the contract."""

from __future__ import annotations

from functools import partial

import torch

from ffgym.errors import PluginError
from ffgym.plugins import manager
from ffgym.plugins.contracts import call_plugin
from ffgym.prepare.calibrations import Calibration, Consumer, has_ridge_path
from ffgym.pruning.calibration import ConsumerPath


def path_of(calibration: Calibration, consumer: Consumer, where: str) -> ConsumerPath:
    """Let a calibration refit one consumer; ``where`` is the sublayer's name, for messages.

    Raises:
        PluginError: it raised, or its weights have another shape or are not finite.
    """
    if has_ridge_path(type(calibration)):
        return consumer.refit
    path = call_plugin(calibration, lambda: calibration.path(consumer), f"refitting {where}")
    if path is consumer.refit:
        return path
    who = f"{manager.described(calibration)}, {where}"
    if not isinstance(path, ConsumerPath):
        raise PluginError(f"{who}: path returned {type(path).__name__}, not a ffgym.ConsumerPath")
    named = _Named(path, calibration, f"refitting {where}")
    outputs, channels = consumer.weight.shape
    for kept in {channels, channels // 2}:
        _check(named.weight_at(kept), (outputs, kept), f"{who}: weight_at({kept})")
        if (bias := named.bias_at(kept)) is not None:
            _check(bias, (outputs,), f"{who}: bias_at({kept})")
        if bias is None and consumer.bias is not None:
            raise PluginError(f"{who}: bias_at({kept}) is None, and the consumer has a bias: it would be lost")
        if bias is not None and consumer.bias is None and not calibration.affine:
            raise PluginError(
                f"{who}: bias_at({kept}) is a bias, and the consumer has none",
                hint="Return None, or say affine = True, which gives every consumer a bias.",
            )
    return named


class _Named(ConsumerPath):
    """A plugin's path, whose errors name the plugin, even in an episode."""

    def __init__(self, path: ConsumerPath, calibration: Calibration, doing: str) -> None:
        self._path = path
        self._call = partial(call_plugin, calibration, doing=doing)

    def weight_at(self, channels: int) -> torch.Tensor:
        return self._call(lambda: self._path.weight_at(channels))

    def bias_at(self, channels: int) -> torch.Tensor | None:
        return self._call(lambda: self._path.bias_at(channels))

    def slopes(
        self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor | None, start: int, end: int
    ) -> torch.Tensor:
        return self._call(lambda: self._path.slopes(weight_gradient, bias_gradient, start, end))


def _check(tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise PluginError(f"{what} is {type(tensor).__name__}, not a tensor")
    if tuple(tensor.shape) != shape:
        raise PluginError(f"{what} has shape {tuple(tensor.shape)}, not {shape}")
    if not tensor.is_floating_point():  # the model's own dtype would round the numbers, or drop a part of them
        raise PluginError(f"{what} has dtype {tensor.dtype}, not one of floating-point numbers")
    if not tensor.isfinite().all():
        raise PluginError(f"{what} holds NaN or infinity")
