"""Compares a pruned model with the dense one it was made from: do they belong together, and which units are kept?"""

from __future__ import annotations

from typing import Any

from torch import nn

from ffgym.errors import ModelError
from ffgym.models.families import Family, family_of, family_of_pair
from ffgym.types import Sublayer

HINT = "Name the dense model that this one was made from: --dense MODEL."


def units_kept(pruned: Any, dense: Any) -> tuple[int, ...]:
    """Units that each sublayer of a pruned model keeps, length 2L, in order of depth.

    Args:
        pruned: a saved model as it is loaded again, or any model of the dense one's family with smaller sublayers.
        dense: the model that it was made from.

    Raises:
        ModelError: an unsupported family, or two models that do not belong together; names what differs.
    """
    family_of(dense)  # refuses one that was pruned already
    family = family_of_pair(pruned, dense, hint=HINT)
    layers, sublayers = family.layers(pruned), family.sublayers(dense)
    return tuple(_units(family, layers[sublayer.layer], sublayer) for sublayer in sublayers)


def _units(family: Family, layer: nn.Module, dense: Sublayer) -> int:
    """Units of one half of a pruned layer."""
    if dense.kind == "experts":
        return int(family.expert_modules(layer)[0].num_experts)
    if not family.has_half(layer, dense.kind):
        return 0
    units, rest = divmod(family.consumer(layer, dense.kind).in_features, dense.channels_per_unit)
    rows = [sum(blocks) * units for blocks in family.rows_per_unit(dense)]
    if rest or units > dense.units or [p.out_features for p in family.producers(layer, dense.kind)] != rows:
        raise ModelError(
            f"{dense.name} of the pruned model is no part of the dense one's {dense.units} units of"
            f" {dense.channels_per_unit} channels",
            hint=HINT,
        )
    return units
