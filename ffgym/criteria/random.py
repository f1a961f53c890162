"""A random order: the floor that every other criterion has to beat."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pydantic import Field

from ffgym.plugins.bases import Criterion, PluginConfig
from ffgym.types import LayerStats

if TYPE_CHECKING:
    import torch


class Random(Criterion):
    """A seeded random order.

    A channel's score is a hash of the seed and of its own column of the weight, read as a number in [0, 1). So each
    sublayer gets its own order, the same in every process and on every device, and permuting the channels permutes the
    scores. Equal columns get equal scores.
    """

    name = "random"

    class Config(PluginConfig):
        """Options of the table ``[criterion]``."""

        seed: int = Field(0, ge=0, lt=2**64, description="another seed, another order; from 0")

    def score(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Score channels, shape (n,), float64."""
        import torch

        key = self.config.seed.to_bytes(8, "little")
        columns = weight.detach().float().cpu().T.contiguous().numpy()
        digests = (hashlib.blake2b(column.tobytes(), key=key, digest_size=6).digest() for column in columns)
        numbers = [int.from_bytes(digest, "little") / 2**48 for digest in digests]
        return torch.tensor(numbers, dtype=torch.float64)
