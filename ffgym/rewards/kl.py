"""How far the distribution of the next token moves from the dense model's, whatever token the text has there."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ffgym.plugins.bases import PluginConfig, Reward
from ffgym.types import Evaluation


class KL(Reward):
    """exp(-KL) between the dense and the pruned model: 1 when nothing moves, towards 0 as they part.

    P is the dense model's distribution of the next token, Q the pruned one's, both over the whole vocabulary; the
    divergence is the mean over the predicted tokens, in nats per token.

        forward   KL(P || Q) = E_P[log P - log Q]   large where Q rules out what P allows: Q has to cover P
        reverse   KL(Q || P) = E_Q[log Q - log P]   large where Q allows what P rules out: Q has to stay inside P

    R = exp(-KL) is on the scale of the perplexity ratio: on text drawn from P itself, the expected loss difference that
    `perplexity` exponentiates is KL(P || Q). Unlike that reward, R is at most 1, so that fitting the search text better
    than the dense model earns nothing. It looks at the whole vocabulary at every position, not only at the token that
    the text has; the price is a second product with the output head.
    """

    name = "kl"
    edition = 2  # agents follow its slopes

    class Config(PluginConfig):
        """Options of the table ``[reward]``."""

        direction: Literal["forward", "reverse"] = Field(
            default="forward", description="forward: KL(dense || pruned); reverse: KL(pruned || dense)"
        )

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self.needs = frozenset({self.falls_with})

    @property
    def falls_with(self) -> Literal["kl", "reverse_kl"]:
        """The divergence."""
        return "kl" if self.config.direction == "forward" else "reverse_kl"

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        """exp(-KL)."""
        return math.exp(-getattr(pruned, self.falls_with))
