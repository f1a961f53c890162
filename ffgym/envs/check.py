"""Gymnasium's and Stable-Baselines3's environment checkers on an environment; a warning is a complaint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env as check_with_gymnasium
from stable_baselines3.common.env_checker import check_env as check_with_sb3

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def complaints(env: gymnasium.Env[Any, Any]) -> list[str]:
    """What both checkers complain about in an environment without wrappers."""
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
        except Exception as error:  # whatever a checker raises is a complaint
            failure = [f"{checker}: {type(error).__name__}: {error}"]
    return [f"{checker}: {COLOUR.sub('', str(warning.message))}" for warning in caught] + failure
