"""Let an agent of Stable-Baselines3 search: python examples/stable_baselines.py [run.toml]."""

import sys

import gymnasium
from stable_baselines3 import PPO

import ffgym
import ffgym.envs  # registers ffgym/Pruning-v0
from ffgym.envs.sb3 import SB3VecEnv
from ffgym.export.checkpoint import save_pruned

envs = gymnasium.make_vec("ffgym/Pruning-v0", num_envs=8, config=ffgym.load_config(*sys.argv[1:]))
model = PPO("MlpPolicy", SB3VecEnv(envs), n_steps=1, batch_size=8, gamma=1.0, seed=0)
model.learn(total_timesteps=48)  # 6 updates of 8 episodes

observations, _ = envs.reset(seed=0)
actions, _ = model.predict(observations, deterministic=True)
_, rewards, _, _, infos = envs.step(actions)
kept = infos["final_info"]["kept"][0].tolist()
print(f"reward {rewards[0]:.3f}, units kept {kept}")

prunable = envs.unwrapped.env.prunable
prunable.cut(kept)
save_pruned(prunable, None, "sb3-model", overwrite=True)
