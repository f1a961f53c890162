"""Policies on disk: ``policy.json``, which a run leaves behind and another can start from."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError, FFGymError, is_out_of_memory
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.tracking.store import fetch_artifact
from ffgym.types import JSONDict, Sublayer


class Policy(NamedTuple):
    """What a ``policy.json`` says: an agent's state, and which sublayers it is for (``None`` where it does not say)."""

    state: JSONDict
    sublayers: tuple[str, ...] | None


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
                f"search.init_from = {source!r}: its policy is not what agent {config.agent.name!r} writes ({error!r})",
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
    path = source / "policy.json" if source.is_dir() else source
    try:
        policy = json.loads(path.read_text(encoding="utf-8"))
        for key, form in (("agent", str), ("state", dict)):
            if not isinstance(policy, dict) or not isinstance(policy.get(key), form):
                raise ValueError(f"it has no {key!r} that is a {form.__name__}")
        owner, state, names = policy["agent"], policy["state"], policy.get("sublayers")
        if not isinstance(names, list | None):
            raise ValueError(f"its 'sublayers' is {names!r}, not a list of names")
        sublayers = None if names is None else tuple(str(name) for name in names)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"search.init_from = {str(source)!r}: no policy could be read from {path} ({error})",
            hint="Give the folder of an earlier run, e.g. one under runs/, its policy.json, or its MLflow run id.",
        ) from error
    if owner != config.agent.name:
        raise ConfigError(
            f"search.init_from = {str(source)!r} holds a policy of agent {owner!r}, this run is {config.agent.name!r}",
            hint=f"Use --agent {owner}, or start from a run of {config.agent.name!r}.",
        )
    return Policy(state, sublayers)


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
