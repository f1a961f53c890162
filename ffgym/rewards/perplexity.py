"""The paper's reward."""

from __future__ import annotations

import math

from ffgym.errors import ModelError
from ffgym.plugins.bases import Reward
from ffgym.types import Evaluation


class Perplexity(Reward):
    """Dense perplexity over pruned perplexity: 1 when nothing is lost, towards 0 as the model breaks.

    R = PPL_dense / PPL_pruned (arXiv 2511.18977, Eq. 2), on the same windows. An episode whose loss is not finite earns
    0, the limit of R.
    """

    name = "perplexity"

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        """Compare the two mean losses."""
        return perplexity_ratio(pruned, dense)


def perplexity_ratio(pruned: Evaluation, dense: Evaluation) -> float:
    """exp(loss_dense - loss_pruned), losses in nats per token; it does not overflow where a perplexity does.

    Raises:
        ModelError: it overflows all the same.
    """
    try:
        return math.exp(dense.loss - pruned.loss)
    except OverflowError:
        raise ModelError(
            f"the reward overflows: the pruned loss is {pruned.loss:.4g} and the dense loss {dense.loss:.4g} nats per "
            "token",
            hint="Check the model's weights and the text: no working language model has such losses.",
        ) from None
