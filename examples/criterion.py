"""A criterion of your own, and the test that checks its contract: pytest examples/criterion.py.

`ffgym new criterion product` writes a package for it, so that `ffgym run --criterion product` finds it.
"""

import ffgym
from ffgym.testing.conformance import CriterionConformance


class Product(ffgym.Criterion):
    """Norm of a channel's weights times the norm of its inputs."""

    name = "product"
    needs = frozenset({"square"})

    def score(self, weight, stats):
        """Score channels: weight (outputs, channels) -> (channels,)."""
        return weight.norm(dim=0) * stats.square.sqrt()


@ffgym.hookimpl
def ffgym_criteria():
    """Offer the criterion."""
    return [Product]


class TestProduct(CriterionConformance):
    """What every criterion promises."""

    def make(self):
        """Make a fresh instance."""
        return Product()
