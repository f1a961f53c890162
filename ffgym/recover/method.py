"""The base class of recovery methods, what a method is given, and what it hands back. One file a method."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ffgym.errors import RecoveryError
from ffgym.plugins.bases import Plugin
from ffgym.types import JSONDict

if TYPE_CHECKING:
    import torch

    from ffgym.recover.checkpoint import Checkpoint
    from ffgym.report.progress import StageProgress


@dataclass(frozen=True)
class TrainingSetup:
    """What a recovery method is given.

    Attributes:
        model: causal LM, float32 or bfloat16, in eval mode and frozen. It is trained in place and left like that; a
            parameter that is gone, in another dtype or on another device is refused.
        dense: the model that it was pruned from, where the method ``needs_dense``; otherwise ``None``.
        windows: training token ids, shape (windows, length), int64.
        held_out: token ids that decide which weights to keep, shape (windows, length), int64.
        held_out_loss: the model's loss on ``held_out`` as it is now, nats per token.
        tokens: how many to learn from, all epochs together.
        batch_tokens: tokens of one optimiser step.
        learning_rate: the highest of the schedule.
        evaluate_every: steps between measurements on held-out text.
        seed: all randomness comes from it.
        tokens_per_pass: how many tokens one forward pass may take.
        progress: ``with progress(steps) as stage`` shows how far it is: ``stage.advance(steps, note)``.
        log: takes metrics as (name, value, step).
        checkpoint: where to go on from and to write to; ``None`` for nowhere.
    """

    model: Any
    dense: Any
    windows: torch.Tensor
    held_out: torch.Tensor
    held_out_loss: Callable[[], float]
    tokens: int
    batch_tokens: int
    learning_rate: float
    evaluate_every: int
    seed: int
    tokens_per_pass: int
    progress: Callable[[int], AbstractContextManager[StageProgress]]
    log: Callable[[Sequence[tuple[str, float, int]]], None]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class TrainingOutcome:
    """What came of a training. The commands measure its held-out loss, and undo it where that did not become lower.

    Attributes:
        summary: a sentence that says what was done.
        kept: which weights the model has now, e.g. ``"the adapters of step 4 were merged"``.
        curve: how training went, JSON, for ``recovery.json``.
    """

    summary: str
    kept: str
    curve: JSONDict


class Recovery(Plugin, ABC):
    """Trains a pruned model.

    Attributes:
        learning_rate: what ``recover.learning_rate = "auto"`` stands for.
        needs_dense: whether it learns from the model that was pruned.
        requires: modules that have to be installed, each with the command that installs it.
        free_options: options that decide no number: an interrupted training may go on with other values.
    """

    kind = "recovery"
    learning_rate: ClassVar[float] = 1e-4
    needs_dense: ClassVar[bool] = False
    requires: ClassVar[Mapping[str, str]] = {}
    free_options: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def train(self, setup: TrainingSetup) -> TrainingOutcome:
        """Train the model in place.

        Ctrl-C may come at any moment: what is in ``setup.checkpoint`` by then is there when the same training is
        started again.
        """

    @classmethod
    def check_installed(cls) -> None:
        """Raise ``RecoveryError`` where a required module is not installed."""
        for module, command in cls.requires.items():
            if importlib.util.find_spec(module) is None:
                raise RecoveryError(
                    f"recovery by {cls.name} needs the package {module}, which is not installed",
                    hint=f"Install it: {command}",
                )
