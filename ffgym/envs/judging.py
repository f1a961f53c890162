"""What a measured allocation is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ffgym.plugins.bases import Reward
from ffgym.plugins.contracts import check_objectives, check_reward
from ffgym.types import Evaluation


@dataclass(frozen=True)
class Judgement:
    """The verdict of a reward.

    Attributes:
        reward: the reward, or its ``worst`` where the model broke down.
        failed: the cut model's losses or divergences are not finite.
        objectives: what the reward weighs, by name, higher = better; empty where it weighs nothing, or failed.
    """

    reward: float
    failed: bool = False
    objectives: dict[str, float] = field(default_factory=dict)


def judge(
    reward: Reward, pruned: Evaluation, dense: Evaluation, *, objectives: Sequence[str] | None = None
) -> Judgement:
    """Let a reward compare the cut model with the dense one on the same windows and examples.

    Args:
        objectives: the names of its objectives so far; ``None`` the first time.

    Raises:
        PluginError: the reward broke its contract.
    """
    if not pruned.finite:
        return Judgement(float(reward.worst), failed=True)
    value = check_reward(reward, pruned, dense)
    return Judgement(value, objectives=check_objectives(reward, pruned, dense, names=objectives))
