"""The criterion keeps its contract, and computes what its docstring says."""

import pytest
import torch
from ffgym_output_energy import OutputEnergy

from ffgym import FFGymError, LayerStats
from ffgym.plugins import manager
from ffgym.testing.conformance import CriterionConformance


class TestOutputEnergy(CriterionConformance):
    def make(self) -> OutputEnergy:
        return OutputEnergy()


class TestByItself(CriterionConformance):
    def make(self) -> OutputEnergy:
        return OutputEnergy(OutputEnergy.Config(shared=0.0))


def test_all_shares_together_are_the_output_energy() -> None:
    weight, x = torch.randn(5, 8, dtype=torch.float64), torch.randn(100, 8, dtype=torch.float64)
    stats = LayerStats(second_moment=x.T @ x / 100)
    shares = OutputEnergy(OutputEnergy.Config(shared=1.0)).score(weight, stats)
    torch.testing.assert_close(shares.sum(), (x @ weight.T).square().sum(dim=1).mean())


def test_a_channel_that_others_cancel_is_worth_less() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0]])
    moment = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    scores = OutputEnergy().score(weight, LayerStats(second_moment=moment))
    torch.testing.assert_close(scores, torch.tensor([0.55, 0.55, 1.0]))


def test_an_impossible_option_names_the_table() -> None:
    with pytest.raises(FFGymError, match=r"criterion\.shared = 2"):
        manager.create("criterion", "output-energy", {"shared": 2})
