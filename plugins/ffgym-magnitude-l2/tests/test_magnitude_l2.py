"""The plugin keeps a criterion's contract, and computes what its docstring says."""

import pytest
import torch
from ffgym_magnitude_l2 import MagnitudeL2

from ffgym import FFGymError, LayerStats
from ffgym.plugins import manager
from ffgym.testing.conformance import CriterionConformance


class TestMagnitudeL2(CriterionConformance):
    def make(self) -> MagnitudeL2:
        return MagnitudeL2()


class TestMagnitudeL2Squared(CriterionConformance):
    def make(self) -> MagnitudeL2:
        return MagnitudeL2(MagnitudeL2.Config(exponent=2.0))


def test_score_is_the_norm_of_the_column() -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    torch.testing.assert_close(MagnitudeL2().score(weight, LayerStats()), torch.tensor([5.0, 2.0]))


def test_ffgym_finds_it_by_name() -> None:
    criterion = manager.create("criterion", "magnitude-l2", {"exponent": 2.0})
    assert isinstance(criterion, MagnitudeL2)
    assert criterion.config.exponent == 2.0
    assert str(manager.package_of(criterion)) == "ffgym-magnitude-l2 0.1.0"


def test_impossible_option_names_the_table() -> None:
    with pytest.raises(FFGymError, match=r"criterion\.exponent = -1"):
        manager.create("criterion", "magnitude-l2", {"exponent": -1})
