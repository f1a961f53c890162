"""The pruning task as Gymnasium environments: one decision is one episode.

Importing this module registers ``ffgym/Pruning-v0``.
"""

from gymnasium.envs.registration import register, registry

from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule, Stage
from ffgym.envs.vector import PruningVectorEnv

__all__ = ["PruningEnv", "PruningVectorEnv", "Schedule", "Stage"]

ENV_ID = "ffgym/Pruning-v0"

if ENV_ID not in registry:
    register(
        id=ENV_ID,
        entry_point="ffgym.pipeline.make_env:make_pruning_env",
        vector_entry_point="ffgym.pipeline.make_env:make_pruning_vector_env",
        disable_env_checker=True,  # it fails at every step where the first reset was refused
    )
