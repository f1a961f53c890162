"""An agent is made from its configuration, and from another run's policy where one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffgym.agents.ppo import PPO
from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError
from ffgym.pipeline.agent import make_agent
from ffgym.search.policy import read_policy
from ffgym.testing.toys import SeparableEnv

AGENTS = """
import ffgym, torch
from ffgym.agents.random_search import RandomSearch

class Picky(RandomSearch):
    "Needs a prior, and takes up a state that has a place in it."

    name = "picky"
    needs_prior = True

    def load_state(self, state):
        if state["place"].upper() == "TORCH":
            torch.nn.Linear(2, 1).load_state_dict({"weight": torch.ones(1, 3), "bias": torch.ones(1)})

class Forgetful(Picky):
    "Takes up nothing."

    name = "forgetful"
    load_state = ffgym.Agent.load_state

@ffgym.hookimpl
def ffgym_agents():
    return [Picky, Forgetful]
"""


@pytest.fixture(autouse=True)
def _picky(install: Callable[..., None]) -> None:
    install("acme-picky", AGENTS)


def config(agent: str, **tables: Any) -> RunConfig:
    return RunConfig.model_validate({"agent": {"name": agent}, **tables})


def policy(folder: Path, **changes: Any) -> str:
    path = folder / "policy.json"
    content = {"agent": "picky", "state": {"place": "here"}, "sublayers": ["layer 0 attention"]}
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_an_agent_that_needs_a_prior_is_not_made_without_one() -> None:
    assert make_agent(config("picky")).name == "picky"
    with pytest.raises(ConfigError, match=r"agent 'picky' needs a prior, and prior\.name is 'none'"):
        make_agent(config("picky", prior={"name": "none"}))


def test_a_run_without_a_policy_says_why(tmp_path: Path) -> None:
    (tmp_path / "episodes.jsonl").touch()
    with pytest.raises(ConfigError, match="has left no policy: it ended too early, or its agent hands none on"):
        read_policy(tmp_path, "reinforce")


def test_a_policy_for_an_agent_that_takes_up_none_is_refused_and_not_forgotten(tmp_path: Path) -> None:
    source = policy(tmp_path, agent="forgetful")
    with pytest.raises(ConfigError, match=r"agent 'forgetful' cannot start from a policy"):
        make_agent(config("forgetful", search={"init_from": source}))


@pytest.mark.parametrize(
    "state", [{}, {"place": 3}, {"place": None}, {"place": "torch"}], ids=["missing", "number", "nothing", "shape"]
)
def test_a_state_of_another_form_is_said_to_be_one(tmp_path: Path, state: dict[str, Any]) -> None:
    source = policy(tmp_path, state=state)
    with pytest.raises(ConfigError, match="its policy does not have the form that agent 'picky' writes"):
        make_agent(config("picky", search={"init_from": source}))


@pytest.mark.parametrize("weights", [[[0.5, 0.5]], [[0.5], [0.5]], 1.0], ids=["one row", "one sublayer", "a number"])
def test_a_state_of_another_shape_is_refused_before_anything_is_prepared(tmp_path: Path, weights: Any) -> None:
    source = policy(tmp_path, agent="reinforce", state={"weights": weights}, sublayers=["attention", "mlp"])
    with pytest.raises(ConfigError, match="its policy does not have the form that agent 'reinforce' writes"):
        make_agent(config("reinforce", search={"init_from": source}))


def test_an_agent_that_is_no_batch_agent_refuses_a_state_for_other_sublayers_too(tmp_path: Path) -> None:
    learned = PPO()
    learned.learn(SeparableEnv(num_envs=2, dimensions=2, tokens=2), seed=0, on_update=lambda update: None)
    for centre, sublayers in (([0.0], ["attention", "mlp"]), ([0.0, 0.0], ["mlp"])):
        source = policy(tmp_path, agent="ppo", state={**learned.state(), "centre": centre}, sublayers=sublayers)
        with pytest.raises(ConfigError, match="its policy does not have the form that agent 'ppo' writes"):
            make_agent(config("ppo", search={"init_from": source}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "Input should be an object"),
        ('{"agent": "picky"}', "state: Field required"),
        ('{"agent": "picky", "state": null}', "state: Input should be an object, not None"),
        ('{"agent": "picky", "state": {"mean": [1e400]}, "sublayers": ["a"]}', "state: .* not JSON compliant"),
        ('{"agent": "picky", "state": {}}', "sublayers: Field required"),
        ('{"agent": "picky", "state": {}, "sublayers": 3}', "sublayers: Input should be a valid array, not 3"),
        ('{"agent": "picky", "state": {}, "sublayers": []}', "sublayers: Tuple should have at least 1 item"),
    ],
)
def test_a_file_that_is_no_policy_says_what_it_lacks(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"policy.json is no policy, or a damaged one: .*{said}"):
        read_policy(path, "picky")
