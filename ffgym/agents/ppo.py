"""PPO: Stable-Baselines3's own, through a real ``VecEnv`` (Schulman et al. 2017, arXiv 1707.06347; SB3 2.x).

The problem: maximise E_{a ~ pi(. | o)}[R(a)] for a Gaussian policy whose mean is a small network of the observation
(target sparsity, fidelity), with steps limited by the clipped probability ratio. An episode is one step, so one rollout
is one update (``n_steps=1``, ``batch_size=num_envs``) and the discount never matters. At a few hundred episodes SB3's
defaults barely move: a larger learning rate and a smaller initial spread do. The spread is that of
``reinforce`` and ``cma-es``.

Runs on the CPU. Seeding SB3 seeds the global generators of Python, NumPy and torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box
from pydantic import Field
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy

from ffgym.envs.sb3 import SB3VecEnv
from ffgym.errors import ConfigError
from ffgym.plugins.bases import Agent, OnUpdate, PluginConfig
from ffgym.types import Update

SPREAD = 0.15  # standard deviation of the exploration at the start, in importance units


class PPOConfig(PluginConfig):
    """Options of the agent."""

    learning_rate: float = Field(3e-3, gt=0, description="learning rate of Adam, above 0")
    layers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 64), min_length=1, description="widths of the hidden layers of the policy's network, and of the critic's"
    )


class PPO(Agent):
    """SB3's PPO; its actions are offsets from the prior: importance = clip(prior + action)."""

    name = "ppo"
    Config: ClassVar[type[PluginConfig]] = PPOConfig
    least_episodes = 2
    _policy: Any = None
    _centre: np.ndarray | None = None  # importances that actions are offsets from, shape (2L,)

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Collect one rollout, train on it, report, until no tokens are left."""
        self.check_updates(env.num_envs)
        vec = SB3VecEnv(env, self.prior_mean if self._policy is None else self._centre)
        model = self._made(vec, seed)
        if self._policy is not None:
            model.policy.load_state_dict(self._policy.state_dict())
        self._policy, self._centre = model.policy, vec.centre
        heard = _LastRewards()
        index = 0
        # One rollout a call: a callback that stops SB3 at the last step would leave that rollout untrained.
        while env.unwrapped.tokens_left > 0:
            model.learn(env.num_envs, callback=heard, log_interval=None, reset_num_timesteps=index == 0)
            spread = float(model.policy.log_std.detach().exp().mean())
            on_update(Update(index=index, rewards=heard.rewards, diagnostics={"policy/spread": spread}))
            index += 1

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The policy's mean at that observation."""
        if self._policy is None:
            return []
        action, _ = self._policy.predict(np.asarray(observation, np.float32), deterministic=True)
        return [np.asarray(np.clip(self._centre + action, -1.0, 1.0), dtype=np.float32)]

    def state(self) -> dict[str, Any]:
        """The policy's parameters as nested lists, and the importances that its actions are offsets from."""
        if self._policy is None or self._centre is None:
            return {}
        parameters = {name: value.tolist() for name, value in self._policy.state_dict().items()}
        return {"centre": self._centre.tolist(), "policy": parameters}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start the next search from this policy (with a fresh optimizer).

        Raises:
            ConfigError: its network has other layers.
        """
        biases = (name for name in state["policy"] if re.fullmatch(r"mlp_extractor\.policy_net\.\d+\.bias", name))
        layers = [len(state["policy"][name]) for name in biases]
        if layers != list(self.config.layers):
            raise ConfigError(
                f"the policy to start from has agent.layers = {layers}, and this run has {list(self.config.layers)}",
                hint=f"Set agent.layers = {layers}, or start from another policy.",
            )
        centre = np.array(state["centre"], dtype=np.float32)
        offsets = Box(-1 - centre, 1 - centre, dtype=np.float32)
        policy = ActorCriticPolicy(Box(0, 1, (2,), np.float32), offsets, lambda _: 0.0, net_arch=layers)
        policy.load_state_dict({name: torch.tensor(value) for name, value in state["policy"].items()})
        self._policy, self._centre = policy, centre

    def _made(self, vec: SB3VecEnv, seed: int) -> Any:
        model = SB3PPO(
            "MlpPolicy",
            vec,
            learning_rate=self.config.learning_rate,
            n_steps=1,
            batch_size=vec.num_envs,
            policy_kwargs={"net_arch": list(self.config.layers), "log_std_init": math.log(SPREAD)},
            seed=seed,
            device="cpu",
        )
        model.set_logger(Logger(folder=None, output_formats=[]))
        return model


class _LastRewards(BaseCallback):  # type: ignore[misc]  # SB3 is not type-checked here
    """Remembers the rewards of the rollout, shape (num_envs,)."""

    rewards: np.ndarray

    def _on_step(self) -> bool:
        self.rewards = np.array(self.locals["rewards"], dtype=np.float64)
        return True
