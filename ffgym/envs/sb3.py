"""Our vector environment as Stable-Baselines3's own ``VecEnv``, the only one that SB3 takes.

SB3 wants one info dict per environment, the last observation of an episode under ``terminal_observation``, float32
rewards, and an environment that begins its next episode in the step that ended one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from ffgym.envs.pruning_env import real_numbers
from ffgym.errors import ConfigError, DataError


class SB3VecEnv(VecEnv):  # type: ignore[misc]  # SB3 is not type-checked here
    """A ``gymnasium.vector.VectorEnv`` with SAME_STEP autoreset, for Stable-Baselines3.

    Actions are offsets from ``centre``; the action space is exactly those offsets whose importances lie in the wrapped
    environment's space.

    Args:
        centre: importances that the action 0 stands for, shape (2L,); 0 where left out.

    Raises:
        ConfigError: another autoreset mode, where every second step would be a reset without a reward; a centre of
            another shape.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], centre: np.ndarray | None = None) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ConfigError(
                f"Stable-Baselines3 needs a vector environment with SAME_STEP autoreset, this one has {mode}",
                hint="Make it with autoreset_mode=AutoresetMode.SAME_STEP.",
            )
        self.env = env
        space = env.single_action_space
        assert isinstance(space, Box), "importances are a box"
        self.importance_space = space
        self.centre = np.zeros(space.shape, np.float32) if centre is None else np.asarray(centre, np.float32)
        if self.centre.shape != space.shape:
            raise ConfigError(
                f"the centre has shape {self.centre.shape}, and importances have shape {space.shape}",
                hint="Give one importance for each sublayer, or leave the centre out.",
            )
        self._actions: np.ndarray | None = None
        offsets = Box(space.low - self.centre, space.high - self.centre, dtype=np.float32)
        super().__init__(env.num_envs, env.single_observation_space, offsets)

    def __repr__(self) -> str:
        return f"SB3VecEnv({self.env!r})"

    def importances(self, actions: np.ndarray) -> np.ndarray:
        """What actions stand for: clip(centre + action), float32."""
        space = self.importance_space
        return np.asarray(np.clip(self.centre + actions, space.low, space.high), dtype=np.float32)

    def reset(self) -> np.ndarray:
        """Begin; of the seeds and options that have been set, the first ones decide everything."""
        seed, options = self._seeds[0], self._options[0] or None
        self._reset_seeds()  # before they are used: what is refused once must not come back with every reset
        self._reset_options()
        observations, _ = self.env.reset(seed=seed, options=options)
        return np.asarray(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the offsets, shape (num_envs, 2L); raises ``DataError`` for another shape, or no real numbers."""
        actions = real_numbers(actions)
        shape = (self.num_envs, *self.action_space.shape)
        if actions.shape != shape:
            raise DataError(
                f"actions have shape {actions.shape}, not {shape}: (environments, sublayers)",
                hint="Give one action for each environment.",
            )
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Measure them: observations, rewards (float32), dones, infos."""
        assert self._actions is not None, "step_async comes first"
        following, rewards, terminated, truncated, infos = self.env.step(self.importances(self._actions))
        dones = terminated | truncated
        last, final = infos.get("final_obs", following), infos.get("final_info", {})
        each: list[dict[str, Any]] = [
            {name: values[i] for name, values in final.items()}
            | {"terminal_observation": last[i], "TimeLimit.truncated": bool(truncated[i] and not terminated[i])}
            if dones[i]
            else {}
            for i in range(self.num_envs)
        ]
        return following, rewards.astype(np.float32), dones, each

    def close(self) -> None:
        """Close the wrapped environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The vector environment's pictures, one per environment, for ``render`` and video recorders."""
        pictures: Any = self.env.render()
        return pictures or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The vector environment's attribute, once per index: it stands for all of its environments."""
        return [getattr(self.env, attr_name)] * len(self._get_indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set the vector environment's attribute."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call the vector environment's method once; its answer once per index."""
        return [getattr(self.env, method_name)(*args, **kwargs)] * len(self._get_indices(indices))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False] * len(self._get_indices(indices))
