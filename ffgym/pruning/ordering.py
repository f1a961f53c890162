"""From scores to the pruning path's order: which unit goes first (docs/mathematics.md, One order, every level).

Units are sorted once, from most to least important. After the weights are permuted in that order, "keep k units" means
"keep the first k".
"""

from __future__ import annotations

import torch


def unit_scores(scores: torch.Tensor, channels_per_unit: int) -> torch.Tensor:
    """Sums over the contiguous channels that each unit owns, shape (units,), float32.

    Args:
        scores: of elements, shape (m, n), which are summed over the rows first, or of channels, shape (n,).
    """
    scores = scores.float()
    channels = scores.sum(dim=0) if scores.ndim == 2 else scores
    return channels.reshape(-1, channels_per_unit).sum(dim=1)


def unit_order(scores: torch.Tensor) -> torch.Tensor:
    """Indices of the units, most important first, shape (units,), int64; equal scores keep their original order."""
    return torch.sort(scores, descending=True, stable=True).indices


def expand_order(order: torch.Tensor, block: int) -> torch.Tensor:
    """The order of the rows or columns, ``block`` contiguous ones a unit, for one of units; shape (units * block,)."""
    return (order[:, None] * block + torch.arange(block, device=order.device)).reshape(-1)
