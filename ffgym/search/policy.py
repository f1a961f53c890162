"""Policies on disk: a run writes ``policy.json``, and another run can start from it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError, FFGymError, is_out_of_memory
from ffgym.files import FileFormat
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.tracking.store import fetch_artifact
from ffgym.types import JSONDict, Sublayer


class Policy(BaseModel):
    """The content of a ``policy.json``: an agent, its state, and for which sublayers (``None`` if it does not say)."""

    model_config = ConfigDict(strict=True)

    agent: str
    state: JSONDict
    sublayers: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


POLICY = FileFormat(
    "policy",
    Policy,
    ConfigError,
    "Give search.init_from the folder of an earlier run, e.g. one under runs/, its policy.json, or its MLflow run id.",
)


def make_agent(config: RunConfig) -> Agent:
    """The agent of a run, started from another run's policy where ``search.init_from`` names one.

    Raises:
        ConfigError: no such agent, options or policy, or no prior where it needs one.
    """
    agent = manager.create("agent", config.agent.name, config.agent.options)
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
                start = read_policy(policy, config)
        else:
            start = read_policy(Path(source).expanduser(), config)
        agent.policy_sublayers = start.sublayers
        try:
            agent.load_state(start.state)
        except FFGymError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"search.init_from = {source!r}: its policy does not have the form that agent "
                f"{config.agent.name!r} writes ({error!r})",
                hint="Start from another run, or leave --init-from out.",
            ) from error
    return agent


def read_policy(source: Path, config: RunConfig) -> Policy:
    """Another run's ``policy.json``.

    Args:
        source: a run's folder, or the file.
        config: the run that wants to start from it.

    Raises:
        ConfigError: nothing there, damaged, or of another agent.
    """
    policy = POLICY.read(source / "policy.json" if source.is_dir() else source)
    if policy.agent != config.agent.name:
        raise ConfigError(
            f"search.init_from = {str(source)!r} holds a policy of agent {policy.agent!r}, this run is "
            f"{config.agent.name!r}",
            hint=f"Use --agent {policy.agent}, or start from a run of {config.agent.name!r}.",
        )
    return policy


def policy_digest(config: RunConfig) -> str | None:
    """Digest of the policy file that ``search.init_from`` names; ``None`` where it names none, or a run of MLflow."""
    if config.search.init_from is None:
        return None
    source = Path(config.search.init_from).expanduser()
    path = source / "policy.json" if source.is_dir() else source
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def policy_text(config: RunConfig, sublayers: Sequence[Sublayer], state: JSONDict) -> str:
    """What a ``policy.json`` holds.

    Args:
        config: the run whose agent this is.
        sublayers: the 2L sublayers that its importances are for.
        state: what the agent's ``state`` returned.
    """
    policy = {
        "agent": config.agent.name,
        "sparsity": config.prune.sparsity,
        "sublayers": [sublayer.name for sublayer in sublayers],
        "state": state,
    }
    return json.dumps(policy, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
