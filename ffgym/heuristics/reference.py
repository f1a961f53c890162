"""The sparsity that a heuristic decides at, if its rule needs one."""

from __future__ import annotations

from ffgym.plugins.bases import Heuristic


def reference_sparsity(heuristic: Heuristic) -> float:
    """Its option ``reference``, else the target, else 0.2; a share of the prunable parameters."""
    return next(s for s in (heuristic.config.reference, heuristic.target, 0.2) if s is not None)
