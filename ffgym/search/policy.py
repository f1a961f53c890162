"""Policies on disk: a run writes ``policy.json``, and another run can start from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ffgym.errors import ConfigError
from ffgym.files import FileFormat
from ffgym.types import JSONDict


def _finite(state: JSONDict) -> JSONDict:
    """Refuse NaN and infinities, however deep in it."""
    json.dumps(state, allow_nan=False)
    return state


class Policy(BaseModel):
    """The content of a ``policy.json``: an agent, its state, and for which sublayers."""

    model_config = ConfigDict(strict=True)

    agent: str
    state: Annotated[JSONDict, AfterValidator(_finite)]
    sublayers: Annotated[tuple[str, ...], Field(min_length=1)]


POLICY = FileFormat(
    "policy",
    Policy,
    ConfigError,
    "Give search.init_from the folder of an earlier run, e.g. one under runs/, its policy.json, or its MLflow run id.",
)


def read_policy(source: Path, agent: str) -> Policy:
    """Another run's ``policy.json``.

    Args:
        source: a run's folder, or the file.
        agent: name of the agent that is to start from it.

    Raises:
        ConfigError: nothing there, damaged, or of another agent.
    """
    file = source / "policy.json" if source.is_dir() else source
    if not file.exists() and (source / "episodes.jsonl").exists():
        raise ConfigError(
            f"the run in {str(source)!r} has left no policy: it ended too early, or its agent hands none on",
            hint="Continue it with --resume, or start from a run of an agent that has a `state`, e.g. 'reinforce'.",
        )
    policy = POLICY.read(file)
    if policy.agent != agent:
        raise ConfigError(
            f"search.init_from = {str(source)!r} holds a policy of agent {policy.agent!r}, this run is {agent!r}",
            hint=f"Use --agent {policy.agent}, or start from a run of {agent!r}.",
        )
    return policy
