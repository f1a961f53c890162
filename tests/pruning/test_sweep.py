"""Bisection finds the levels that the plain sweep grants, which sorts all levels and takes one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffgym.pruning.budget import Budget
from ffgym.pruning.sweep import Ladder, Sweep
from ffgym.types import Sublayer

seeds = st.integers(0, 2**32 - 1)
shares = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))
margins = st.sampled_from([1, 4, 32, 512])


def swept(ladders, ties, ratio, limit):
    """The plain sweep of rising nu."""
    owner = np.concatenate([np.full(len(x.units) - 1, i) for i, x in enumerate(ladders)])
    threshold = np.concatenate([(x.units[1:] + x.units[:-1]) / (2 * x.units[-1]) for x in ladders])
    rise = np.concatenate([np.diff(x.cost) for x in ladders])
    times = np.round(threshold - ratio[owner], 9)
    room = limit - sum(x.cost[0] for x in ladders)
    granted, closed = [0] * len(ladders), [False] * len(ladders)
    for event in np.lexsort((ties[owner], times)):
        i = owner[event]
        if closed[i]:
            continue
        if rise[event] <= room:
            granted[i] += 1
            room -= rise[event]
        else:
            closed[i] = True
    return granted


def ladder(rng, i, most):
    """Levels and costs of many kinds: one price, jumps, flat parts, coarse levels, a ragged last one."""
    size = int(rng.choice([1, 3, 8, 60, most]))
    steps = rng.choice([1, 8]) if rng.random() < 0.7 else rng.integers(1, 9, size)
    units = int(rng.integers(0, 3)) + np.cumsum(np.broadcast_to(steps, size))
    if rng.random() < 0.3:
        units = np.append(units, units[-1] + int(rng.integers(1, 8)))
    rises = [
        np.full(len(units) - 1, rng.integers(0, 200)),
        rng.integers(0, 4, len(units) - 1),
        rng.choice([0, 0, 1, 7, 1000], len(units) - 1),
        np.repeat(rng.integers(0, 9, len(units)), 7)[: len(units) - 1],
    ][rng.integers(4)]
    cost = rng.integers(0, 50) + np.concatenate([[0], np.cumsum(rises)])
    return Ladder((i,), units, cost.astype(np.float64))


def ratios(rng, count, kind):
    """Without ties, with many of them, and with times that differ by about what they are rounded to."""
    if kind == "free":
        return rng.uniform(0, 1, count)
    grid = rng.integers(0, 9, count) / 8
    near = rng.choice([0.0, 4e-10, 5e-10, 6e-10, 1e-9, 2e-9], count) if kind == "near" else 0.0
    return np.clip(grid + near, 0.0, 1.0)


@settings(max_examples=300)
@given(seeds, st.integers(1, 12), shares, margins, st.sampled_from(["free", "ties", "near"]))
def test_equals_the_plain_sweep(seed, count, share, margin, kind):
    rng = np.random.default_rng(seed)
    ladders = [ladder(rng, i, most=400) for i in range(count)]
    ties = rng.integers(0, count, count)
    least, most = (sum(x.cost[end] for x in ladders) for end in (0, -1))
    limit = float(least + share * (most - least))
    ratio = ratios(rng, count, kind)
    got = Sweep(ladders, ties, margin=margin).levels(ratio, limit)
    assert got.tolist() == swept(ladders, ties, ratio, limit)


@given(seeds, shares, margins)
def test_equal_ladders_with_equal_wishes_are_served_in_the_order_of_their_ties(seed, share, margin):
    """All times come 40 at once: one of them is the margin, and only the tie-break tells."""
    rng = np.random.default_rng(seed)
    ladders = [Ladder((i,), np.arange(1, 300), 3.0 * np.arange(1, 300)) for i in range(40)]
    ties, ratio = rng.permutation(40), np.full(40, 0.5)
    limit = 120 + share * 3 * 298 * 40
    got = Sweep(ladders, ties, margin=margin).levels(ratio, limit)
    assert got.tolist() == swept(ladders, ties, ratio, limit)
    assert (np.diff(got[np.argsort(ties)]) <= 0).all()


@given(seeds, st.floats(0.05, 0.9))
def test_many_cheap_levels_go_on_after_a_dear_one_was_refused(seed, share):
    """A KV group of 170 channels is refused, and what it leaves goes to channels: more than one margin of them."""
    rng = np.random.default_rng(seed)
    dear = [Ladder((i,), np.arange(4), 170_000.0 * np.arange(4)) for i in range(8)]
    cheap = [Ladder((8 + i,), np.arange(1537), 100.0 * np.arange(1537)) for i in range(8)]
    ratio, ties = rng.uniform(0, 1, 16), np.arange(16)
    limit = share * 8 * (510_000 + 153_600)
    assert Sweep([*dear, *cheap], ties, margin=64).levels(ratio, limit).tolist() == swept(
        [*dear, *cheap], ties, ratio, limit
    )


@pytest.mark.parametrize("rise", [0.0, 1.0])
def test_a_limit_below_the_least_cost_by_rounding_grants_nothing(rise):
    ladders = [Ladder((i,), np.arange(5), 10.0 + rise * np.arange(5)) for i in range(2)]
    assert Sweep(ladders, np.arange(2)).levels(np.array([0.2, 0.9]), 20.0 * (1 - 1e-12)).tolist() == [0, 0]


def test_the_greatest_sparsity_and_what_rounding_adds_are_projected():
    mlp = Sublayer(0, "mlp", units=16, channels_per_unit=1, unit_params=9, unit_macs=9)
    budget = Budget([replace(mlp, layer=layer) for layer in range(3)])
    assert budget.project(np.zeros(3), budget.greatest_sparsity + 9e-13).kept == (1, 1, 1)
