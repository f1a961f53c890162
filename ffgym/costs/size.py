"""What a whole model costs once it is cut, in every resource that is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ffgym.costs.resource import Costs
from ffgym.models.cut import PrunableModel


class SizeMeter:
    """Whole-model costs of any allocation of one dense model.

    Args:
        costs: what it costs dense, by resource; ``params`` among them.
    """

    def __init__(self, prunable: PrunableModel, costs: Mapping[str, Costs]) -> None:
        self._unit_free = [half.unit_free_params for half in prunable.halves]
        self._costs = costs

    def __call__(self, kept: Sequence[int], *, new_biases: int = 0) -> dict[str, float]:
        """Costs with ``kept`` units per sublayer, length 2L, by resource.

        Args:
            new_biases: parameters of the biases that calibration gave consumers without one
                (``PrunableModel.new_bias_params``).
        """
        size = {name: costs.of(kept) for name, costs in self._costs.items()}
        # Biases that no unit owns come with calibration and go with their sublayer; the budget does not count them.
        size["params"] += new_biases - sum(n for n, k in zip(self._unit_free, kept, strict=True) if k == 0)
        return size
