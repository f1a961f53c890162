"""The agent keeps its contract with several samplers, and refuses what Optuna cannot make."""

import numpy as np
import pytest
from ffgym_optuna import Optuna

from ffgym import FFGymError
from ffgym.plugins import manager
from ffgym.testing.conformance import AgentConformance
from ffgym.testing.toys import QuadraticEnv


class TestTPE(AgentConformance):
    def make(self) -> Optuna:
        return Optuna()


class TestCmaEs(AgentConformance):
    def make(self) -> Optuna:
        return Optuna(Optuna.Config(sampler="CmaEsSampler", arguments={"n_startup_trials": 4}))


def test_begins_at_the_prior_and_ends_nearer_to_the_optimum() -> None:
    agent, env = Optuna(), QuadraticEnv(num_envs=8, dimensions=6, tokens=240)
    agent.prior_mean = np.full(6, 0.25)
    seen = []
    step = env.step
    env.step = lambda actions: seen.append(actions) or step(actions)
    agent.learn(env, seed=0, on_update=lambda update: None)
    np.testing.assert_array_equal(seen[0][0], agent.prior_mean)
    (best,) = agent.recommend(np.zeros(2))
    assert env.value(best[None] - env.optimum) > env.value(agent.prior_mean[None] - env.optimum)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sampler": "TPESampeler"}, "Did you mean 'TPESampler'"),
        ({"sampler": "GridSampler"}, "do not make a GridSampler"),
        ({"arguments": {"sigma0": 0.1}}, "do not make a TPESampler.*sigma0"),
    ],
)
def test_what_optuna_cannot_make_is_refused(options: dict, complaint: str) -> None:
    with pytest.raises(FFGymError, match=complaint):
        manager.create("agent", "optuna", options)
