"""Running averages are the averages, however the inputs come in."""

from __future__ import annotations

import pytest
import torch

from ffgym.pruning.statistics import Moments, merge
from ffgym.types import LayerStats

ALL = frozenset({"mean", "square", "second_moment"})


@pytest.fixture
def x():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 1


def averaged(*parts, needs=ALL):
    moments = Moments(5, needs)
    for part in parts:
        moments.update(part)
    return moments.result()


def test_are_the_averages_over_all_tokens(x):
    got = averaged(x[:7], x[7:20], x[20:].reshape(4, 10, 5))
    assert got.tokens == 60
    torch.testing.assert_close(got.mean, x.mean(0))
    torch.testing.assert_close(got.square, x.square().mean(0))
    torch.testing.assert_close(got.second_moment, x.T @ x / 60)
    torch.testing.assert_close(got.variance, x.var(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [frozenset(), {"mean"}, {"square"}, {"second_moment"}, {"mean", "square"}, ALL])
def test_only_what_is_needed_is_there(x, needs):
    got = averaged(x, needs=frozenset(needs))
    there = {name for name in ALL if getattr(got, name) is not None}
    assert there == set(needs)


def test_half_precision_inputs_are_summed_in_full(x):
    got = averaged(*[x.bfloat16()] * 100)
    exact = x.bfloat16().double()
    torch.testing.assert_close(got.mean.double(), exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.second_moment.double(), exact.T @ exact / 60, rtol=1e-4, atol=1e-5)


def test_merging_two_parts_is_the_whole(x):
    got, whole = merge(averaged(x[:13]), averaged(x[13:])), averaged(x)
    assert got.tokens == 60
    for name in ALL:
        torch.testing.assert_close(getattr(got, name), getattr(whole, name))


def test_merging_with_nothing_changes_nothing(x):
    some = averaged(x)
    assert merge(some, averaged()) is some
    assert merge(LayerStats(), LayerStats()) == LayerStats()
