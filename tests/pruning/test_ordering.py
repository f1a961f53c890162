"""Units are sorted by what they own, stably, and their blocks move together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ffgym.pruning.ordering import expand_order, unit_order, unit_scores

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=40).map(lambda x: torch.tensor(x, dtype=torch.float32))
blocks = st.integers(1, 5)


@given(scores)
def test_order_is_a_permutation_from_most_to_least_and_stable(values):
    order = unit_order(values)
    assert sorted(order.tolist()) == list(range(len(values)))
    assert order.tolist() == sorted(range(len(values)), key=lambda i: -values[i].item())  # Python's sort is stable


@given(scores, blocks)
def test_blocks_stay_together(values, block):
    order = unit_order(values)
    expanded = expand_order(order, block)
    assert sorted(expanded.tolist()) == list(range(len(values) * block))
    assert expanded.tolist() == [unit * block + i for unit in order.tolist() for i in range(block)]


def test_elements_are_summed_over_rows_and_channels_kept():
    elements = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert unit_scores(elements, 1).tolist() == [11, 22, 33, 44]
    assert unit_scores(elements[0], 1).tolist() == [1, 2, 3, 4]
    assert unit_scores(elements.double(), 1).dtype == torch.float32
    assert unit_scores(elements, 2).tolist() == [33, 77]
