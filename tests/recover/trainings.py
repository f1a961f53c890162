"""What recovery methods are given in tests, without a progress bar and without MLflow."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ffgym.evaluation.perplexity import evaluate
from ffgym.recover.checkpoint import Checkpoint
from ffgym.recover.method import TrainingSetup


def setup_of(model: Any, texts: tuple[torch.Tensor, torch.Tensor], **wanted: Any) -> TrainingSetup:
    """To train a model on the first text, judged by the second."""
    stage = SimpleNamespace(done=0, advance=lambda steps, note="": None)
    usual = {
        "dense": None,
        "held_out_loss": lambda: evaluate(model, texts[1]).loss,
        "tokens_per_pass": 4096,
        "progress": lambda steps: nullcontext(stage),
        "log": lambda points: None,
    }
    return TrainingSetup(model=model, windows=texts[0], held_out=texts[1], **{**usual, **wanted})


def checkpoint_in(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder, {"a": 1})
    checkpoint.claim()
    return checkpoint
