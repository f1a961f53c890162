"""The built-in criteria keep their contract and compute what their docstrings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffgym.criteria.flap import Flap
from ffgym.criteria.magnitude import Magnitude
from ffgym.criteria.obs import Obs
from ffgym.criteria.random import Random
from ffgym.criteria.taylor import Taylor
from ffgym.criteria.wanda import Wanda
from ffgym.errors import CalibrationError, ConfigError
from ffgym.plugins import manager
from ffgym.plugins.bases import Criterion
from ffgym.plugins.built_ins import BUILTINS
from ffgym.testing.conformance import CriterionConformance
from ffgym.types import LayerStats

WEIGHT = torch.tensor([[1.0, -2.0], [0.0, 3.0]])


class TestContract(CriterionConformance):
    @pytest.fixture(params=BUILTINS["criterion"], autouse=True)
    def _choose(self, request: Any) -> None:
        self.name = request.param

    def make(self) -> Criterion:
        return manager.create("criterion", self.name)


def test_wanda_is_weight_times_input_norm() -> None:
    scores = Wanda().score(WEIGHT, LayerStats(square=torch.tensor([4.0, 9.0])))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 6.0], [0.0, 9.0]]))


def test_magnitude_is_the_absolute_weight() -> None:
    torch.testing.assert_close(Magnitude().score(WEIGHT, LayerStats()), WEIGHT.abs())


def test_random_differs_between_seeds_and_sublayers() -> None:
    weight = torch.randn(6, 40)
    one, two = (Random(Random.Config(seed=seed)).score(weight, LayerStats()) for seed in (0, 1))
    other = Random().score(weight + 1, LayerStats())
    assert len(set(one.tolist())) == 40
    assert not torch.equal(one.argsort(), two.argsort())
    assert not torch.equal(one.argsort(), other.argsort())
    assert float(one.min()) >= 0
    assert float(one.max()) < 1


def test_flap_is_variance_times_squared_column_norm() -> None:
    stats = LayerStats(mean=torch.tensor([1.0, 2.0]), square=torch.tensor([3.0, 4.0]))
    # The second channel is constant: its mean replaces it without loss.
    torch.testing.assert_close(Flap().score(WEIGHT, stats), torch.tensor([2.0, 0.0]))


def test_taylor_is_the_absolute_product() -> None:
    stats = LayerStats(gradient=torch.tensor([[2.0, 1.0], [5.0, -1.0]]))
    torch.testing.assert_close(Taylor().score(WEIGHT, stats), torch.tensor([[2.0, 2.0], [0.0, 3.0]]))


def best_order(x: torch.Tensor, weight: torch.Tensor, block: int) -> tuple[list[int], list[float]]:
    """Units in the order in which they go, and the error after each: every one is tried, and the rest refitted anew."""
    y = x @ weight.double().T
    left, order, errors = list(range(x.shape[1] // block)), [], []
    while left:
        tried = []
        for unit in left:
            kept = [channel for u in left if u != unit for channel in range(u * block, (u + 1) * block)]
            refit = x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution if kept else torch.zeros_like(y)
            tried.append((float((y - refit).square().sum() / len(x)), unit))
        error, unit = min(tried)
        left.remove(unit)
        order.append(unit)
        errors.append(error)
    return order, errors


@pytest.mark.parametrize("block", [1, 2, 3])
def test_obs_is_the_error_after_the_best_refits_without_unit_after_unit(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    x = (torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator)).double()
    weight = torch.randn(3, 6, generator=generator)
    stats = LayerStats(second_moment=x.T @ x / len(x), channels_per_unit=block)
    scores = Obs(Obs.Config(ridge=1e-9)).score(weight, stats).reshape(-1, block).sum(dim=1)
    order, errors = best_order(x, weight, block)
    assert scores.argsort().tolist() == order
    torch.testing.assert_close(scores[order], torch.tensor(errors).double(), rtol=1e-5, atol=0)


def test_obs_in_rounds_leaves_less_error_than_by_what_each_channel_adds_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)).double()
    weight, moment = torch.randn(32, 256, generator=generator).double(), x.T @ x / len(x)

    def error(scores: torch.Tensor) -> float:
        kept = scores.argsort(descending=True)[:128]
        refit = x[:, kept] @ torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
        return float((x @ weight.T - refit).square().mean())

    in_rounds = Obs(Obs.Config(ridge=1e-6)).score(weight, LayerStats(second_moment=moment))
    alone = weight.square().sum(dim=0) / moment.inverse().diagonal()
    assert error(in_rounds) < 0.9 * error(alone)


def test_obs_tends_to_plain_energy_for_a_large_ridge() -> None:
    stats = LayerStats(second_moment=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    scores = Obs(Obs.Config(ridge=1e6)).score(WEIGHT, stats)  # the first channel goes first, then both are gone
    torch.testing.assert_close(scores / scores.max(), torch.tensor([1 / 14, 1]).double(), rtol=1e-4, atol=0)


def test_obs_lets_one_of_two_equal_channels_go_first_and_the_other_last() -> None:
    twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.3]])
    scores = Obs(Obs.Config(ridge=1e-4)).score(torch.ones(1, 3), LayerStats(second_moment=twins))
    assert float(scores[:2].min()) < float(scores[2]) < float(scores[:2].max())


def test_obs_survives_inputs_that_are_zero() -> None:
    scores = Obs().score(WEIGHT, LayerStats(second_moment=torch.zeros(2, 2)))
    assert torch.isfinite(scores).all()


def test_obs_names_its_own_option_when_the_moment_is_indefinite() -> None:
    stats = LayerStats(second_moment=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(CalibrationError, match=r"criterion\.ridge"):
        Obs().score(WEIGHT, stats)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("random", "seed", value) for value in (-1, 2**64, "x")] + [("obs", "ridge", value) for value in (0, -1, "x")],
)
def test_impossible_options_are_refused_by_name(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"criterion\.{option}"):
        manager.create("criterion", name, {option: value})
