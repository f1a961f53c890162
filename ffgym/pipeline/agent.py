"""The agent of a run, started from another run's policy where the configuration names one."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

import numpy as np

from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError, FFGymError, PluginError, is_out_of_memory
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import check_recommendations
from ffgym.search.policy import read_policy
from ffgym.tracking.store import fetch_artifact


def make_agent(config: RunConfig) -> Agent:
    """The agent of a run, started from another run's policy where ``search.init_from`` names one."""
    agent: Agent = manager.create("agent", config.agent.name, config.agent.options)
    if agent.needs_prior and config.prior.name == "none":
        raise ConfigError(
            f"agent {config.agent.name!r} needs a prior, and prior.name is 'none'", hint="Give --prior uniform."
        )
    source = config.search.init_from
    if source is not None:
        if type(agent).load_state is Agent.load_state:
            raise ConfigError(
                f"search.init_from = {source!r}: agent {config.agent.name!r} cannot start from a policy",
                hint="Leave --init-from out.",
            )
        if re.fullmatch("[0-9a-f]{32}", source) and not Path(source).expanduser().exists():
            with tempfile.TemporaryDirectory() as folder:
                policy = fetch_artifact(config.tracking.folder, source, "policy.json", Path(folder))
                start = read_policy(policy, config.agent.name)
        else:
            start = read_policy(Path(source).expanduser(), config.agent.name)
        agent.policy_sublayers = start.sublayers
        try:
            agent.load_state(start.state)
            observation = np.array([config.main_target, 1.0], dtype=np.float32)
            check_recommendations(agent, observation, len(start.sublayers))
        except Exception as error:
            if is_out_of_memory(error) or (isinstance(error, FFGymError) and not isinstance(error, PluginError)):
                raise
            said = error.message if isinstance(error, PluginError) else repr(error)
            raise ConfigError(
                f"search.init_from = {source!r}: its policy does not have the form that agent "
                f"{config.agent.name!r} writes ({said})",
                hint="Start from another run, or leave --init-from out.",
            ) from error
    return agent


def policy_digest(config: RunConfig) -> str | None:
    """Digest of the policy file that ``search.init_from`` names; ``None`` where it names none, or a run of MLflow."""
    if config.search.init_from is None:
        return None
    source = Path(config.search.init_from).expanduser()
    path = source / "policy.json" if source.is_dir() else source
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
