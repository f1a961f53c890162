"""From plain data to an environment: what ``gymnasium.make("ffgym/Pruning-v0", ...)`` calls."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import DataError, UnknownNameError
from ffgym.models.modes import own_modes
from ffgym.pipeline.task import open_task
from ffgym.prepare.configured import schedule_of
from ffgym.prepare.parts import make_reward
from ffgym.prepare.workers import cluster_of, report_idle_workers
from ffgym.report.progress import Reporter


def make_pruning_env(
    config: RunConfig | dict[str, Any] | str | Path | None = None,
    *,
    render_mode: str | None = None,
    num_workers: int | None = None,
    **tables: Any,
) -> PruningEnv:
    """Build the environment from plain data.

    Args:
        config: a ``RunConfig``, the same as nested dicts, or the path of a TOML file; defaults where left out.
        render_mode: ``"rgb_array"``, or ``None`` for no pictures.
        num_workers: processes that measure, in place of ``workers.count``; they end when the environment is closed.
        tables: tables of the configuration, e.g. ``prune={"sparsity": 0.3}``; their keys win over those of ``config``.

    Raises:
        FFGymError: an unknown table, key, plugin or render mode, an impossible value, a model or text that does not
            load, or too little room for the workers.
    """
    config = load_config(load_config(config, **tables), workers={"count": num_workers})
    return _pruning_env(config, 1, render_mode)


@own_modes()
def _pruning_env(config: RunConfig, episodes: int, render_mode: str | None) -> PruningEnv:
    """The environment of a configuration, for steps of this many episodes."""
    if render_mode not in (None, *(modes := PruningEnv.metadata["render_modes"])):
        raise UnknownNameError("render mode", str(render_mode), modes)
    make_reward(config)
    reporter = Reporter()
    report_idle_workers(episodes, config.workers.count, reporter.print)
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(config.workers, config.model.device, reporter.print))
        env = open_task(config, [], reporter, cluster=cluster).env
        env.on_close = stack.pop_all().close
    env.render_mode = render_mode
    return env


def make_pruning_vector_env(
    num_envs: int,
    config: RunConfig | dict[str, Any] | str | Path | None = None,
    *,
    render_mode: str | None = None,
    num_workers: int | None = None,
    **tables: Any,
) -> PruningVectorEnv:
    """Build the vector environment: ``num_envs`` episodes a step, measured on the same text.

    What ``gymnasium.make_vec("ffgym/Pruning-v0", ...)`` calls. Its token budget is that of a run, ``search.episodes``
    full episodes: ramps follow it, ``tokens_left`` counts it, and nothing ends when it is spent.
    The arguments and errors are those of `make_pruning_env`; workers share the episodes of a step.
    """
    if num_envs < 1:
        raise DataError(f"num_envs is {num_envs}: an update needs episodes", hint="Give 1 or more.")
    config = load_config(load_config(config, **tables), workers={"count": num_workers})
    env = _pruning_env(config, num_envs, render_mode)
    budget = config.search.episodes * env.episode_tokens
    return PruningVectorEnv(env, schedule_of(config), num_envs=num_envs, token_budget=budget)
