"""Gymnasium's and Stable-Baselines3's environment checkers on the pruning environment; a warning is a complaint.

The checkers look at the interface, not at the numbers, so the environment is built small whatever the configuration
asks for: windows of at most 128 tokens, two of them for statistics and two to search on, one per episode. An automatic
ridge strength, whose search takes most of the time, is a number instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env as check_with_gymnasium
from stable_baselines3.common.env_checker import check_env as check_with_sb3

from ffgym.config import RunConfig
from ffgym.envs.building import make_pruning_env

WINDOW = 128
RIDGE = 0.01
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def check_environment(config: RunConfig) -> list[str]:
    """Build the environment of a run, small, and let both checkers try it.

    Args:
        config: the run; its model, plugins and budget are taken as they are.

    Returns:
        one complaint per failure or warning, in the order of the checkers; empty = both pass without a warning.
    """
    return complaints(make_pruning_env(small(config)))


def small(config: RunConfig) -> RunConfig:
    """The same run on a handful of short windows."""
    plain = config.model_dump()
    window = min(config.data.window, WINDOW)
    plain["data"] |= {"window": window, "report_tokens": window}
    plain["data"] |= {"calibration_tokens": 2 * window, "search_tokens": 2 * window}
    plain["search"] |= {"episode_tokens": window, "final_tokens": window}
    if config.prune.ridge == "auto":
        plain["prune"] |= {"ridge": RIDGE}
    return RunConfig.model_validate(plain)


def complaints(env: gymnasium.Env[Any, Any]) -> list[str]:
    """What both checkers have to say about an environment that is not wrapped."""
    return [
        *_heard("Gymnasium", lambda: check_with_gymnasium(env, skip_render_check=True)),
        *_heard("Stable-Baselines3", lambda: check_with_sb3(env, warn=True)),
    ]


def _heard(checker: str, check: Callable[[], None]) -> list[str]:
    failure: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check()
        except Exception as error:  # whatever a checker raises is its verdict
            failure = [f"{checker}: {type(error).__name__}: {error}"]
    return [f"{checker}: {COLOUR.sub('', str(warning.message))}" for warning in caught] + failure
