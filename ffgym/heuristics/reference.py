"""The sparsity that a heuristic decides at, if its rule needs one."""

from __future__ import annotations

from pydantic import Field

from ffgym.plugins.bases import Heuristic, PluginConfig


class ReferenceConfig(PluginConfig):
    """Options of the table ``[prior]``."""

    reference: float | None = Field(
        None, gt=0, lt=1, description="share of the prunable parameters that the cut removes; the target if left out"
    )


def reference_sparsity(heuristic: Heuristic) -> float:
    """Its option ``reference``, else the target, else 0.2; a share of the prunable parameters."""
    return next(s for s in (heuristic.config.reference, heuristic.target, 0.2) if s is not None)
