"""REINFORCE and random search on known problems, and every part of the policy gradient against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from ffgym.agents.coarse import SampledUnits
from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.agents.random_search import RandomSearch
from ffgym.agents.reinforce import Reinforce, pair_advantages
from ffgym.pruning.budget import Budget
from ffgym.testing.conformance import AgentConformance
from ffgym.testing.toys import BudgetRangeEnv, QuadraticEnv, RuggedEnv, SeparableEnv
from ffgym.types import Sublayer

OBSERVATION = np.array([0.2, 1.0], dtype=np.float32)


class TestReinforce(AgentConformance):
    def make(self):
        return Reinforce()


class TestReinforceWithoutSlopes(AgentConformance):
    def make(self):
        return Reinforce(Reinforce.Config(average=0.0))


class TestRandomSearch(AgentConformance):
    def make(self):
        return RandomSearch()


def regret(problem, options, seed=0):
    """How far from the best reward, 1, the policy is."""
    agent, env = Reinforce(Reinforce.Config(**options)), problem(num_envs=8, dimensions=6, tokens=240, noise=0.02)
    agent.learn(env, seed=seed, on_update=lambda update: None)
    return 1 - env.value(agent.recommend(OBSERVATION)[0][None] - env.optimum)[0]


# Where nothing is known, 0, costs 0.135 and 0.221.
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("problem", "distance"), [(QuadraticEnv, 0.035), (RuggedEnv, 0.13)])
def test_comes_close_to_a_known_optimum(problem, distance, seed):
    assert regret(problem, {"slopes": False}, seed) < distance


# Here, 0 costs 0.165. The policy leaves alone what moves all importances alike, as a projection would undo it: that
# part of the optimum, 0.026, is not its to find.
@pytest.mark.parametrize("seed", range(3))
def test_finds_all_of_the_optimum_that_it_explores(seed):
    optimum = SeparableEnv(8, 6, 8).optimum
    assert regret(SeparableEnv, {"slopes": False}, seed) - optimum.mean() ** 2 < 0.002


@pytest.mark.parametrize("options", [{"smooth": 0.0}, {"average": 0.0}], ids=str)
def test_every_technique_comes_close_too(options):
    for problem, distance in ((SeparableEnv, 0.04), (QuadraticEnv, 0.04), (RuggedEnv, 0.14)):
        assert regret(problem, {"slopes": False, **options}) < distance


# the step


def begun(dimensions=6, batch=8, **options):
    """An agent that explores from the start: nobody measures slopes for it."""
    agent = Reinforce(Reinforce.Config(**options))
    agent.prior_mean = np.linspace(-0.3, 0.3, dimensions)
    agent.begin(dimensions=dimensions, batch=batch, seed=0)
    return agent, np.tile(OBSERVATION, (batch, 1))


@pytest.mark.parametrize("batch", [8, 7])
def test_episodes_come_in_mirrored_pairs_around_the_prior(batch):
    agent, observations = begun(batch=batch)
    asked = agent.ask(observations)
    half = (batch + 1) // 2
    for one, other in zip(asked[: batch - half], asked[half:], strict=True):
        np.testing.assert_allclose((one + other) / 2, agent.prior_mean, atol=1e-6)


def test_what_is_even_in_the_noise_cancels_within_a_pair():
    agent, observations = begun()
    asked = agent.ask(observations)
    agent.tell(observations, asked, -(np.abs(asked - agent.prior_mean)).round(5).sum(axis=1).astype(np.float64))
    np.testing.assert_allclose(agent.recommend(OBSERVATION)[0], agent.prior_mean, atol=1e-6)


def test_a_step_is_along_the_natural_gradient():
    """Of E[g . a], which is s^2 C g."""
    agent, observations = begun(batch=40_000, average=0.0)
    slope = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0])
    agent.tell(observations, asked := agent.ask(observations), asked @ slope)
    step = agent.recommend(OBSERVATION)[0] - agent.prior_mean
    expected = depth_covariance(6, smooth=0.95) @ slope
    assert step @ expected / np.linalg.norm(step) / np.linalg.norm(expected) > 0.999


def test_a_sublayer_that_kept_the_same_in_both_episodes_of_a_pair_earns_nothing():
    agent, observations = begun()
    asked = agent.ask(observations)
    kept = np.full((8, 6), 3)
    kept[:4, 2] = 2  # one episode of every pair lost a unit there
    agent.tell(observations, asked, np.random.default_rng(0).normal(size=8), kept=kept)
    moved = agent.recommend(OBSERVATION)[0] != np.float32(agent.prior_mean)
    assert moved.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(("share", "averaged"), [(0.5, 2), (0.0, 1), (1.0, 4)])
def test_the_policy_that_is_recommended_is_the_mean_over_the_last_updates(share, averaged):
    agent, observations = begun(average=share)
    passed = []
    for rewards in np.random.default_rng(0).normal(size=(4, 8)):
        agent.tell(observations, agent.ask(observations), rewards)
        passed.append(agent._mean(0.2))
    np.testing.assert_allclose(agent.recommend(OBSERVATION)[0], np.mean(passed[-averaged:], axis=0), atol=1e-6)


@pytest.mark.parametrize("rewards", [np.zeros(8), np.full(8, 0.3)])
def test_equal_rewards_move_nothing(rewards):
    agent, observations = begun()
    agent.tell(observations, agent.ask(observations), rewards)
    np.testing.assert_allclose(agent.recommend(OBSERVATION)[0], agent.prior_mean, atol=1e-6)


# the advantage


def test_advantages_by_hand():
    halves = np.array([-2.0, 1.0, 0.0])
    found = pair_advantages(np.array([1.0, 5.0, 2.0, 7.0, 5.0, 3.0, 2.0]))  # the fourth has no partner
    np.testing.assert_allclose(found, halves / np.sqrt(5 / 3), atol=1e-12)


def test_one_broken_episode_does_not_decide_an_update():
    assert pair_advantages(np.array([0.5] * 8 + [0.0] + [0.499] * 7)).max() == 2.0


# the slopes


def test_follows_slopes_to_the_end_where_nothing_is_coarse():
    sizes = []
    Reinforce().learn(SeparableEnv(8, 6, 64), seed=0, on_update=lambda update: sizes.append(len(update.rewards)))
    assert sizes == [1] * 64


class CoarseEnv(SeparableEnv):
    """Every other sublayer is an attention of 3 units, all kept at first, whose last unit is worth ``WORTH`` of reward.

    That is the mean of two slopes: while a unit is there it promises too much of going, then too little. So while all
    are there, all but 2 seem to be worth nothing.
    """

    WORTH = np.array([0.03, -0.04, 0.06, -0.05, 0.04, -0.03])

    def __init__(self, num_envs, dimensions, tokens, **settings):
        super().__init__(num_envs, dimensions, tokens, **settings)
        self.coarse = np.arange(dimensions) % 2 == 0
        self.units = np.where(self.coarse, 3, 1000)

    def value(self, offsets):
        lost = 3 - self.kept(offsets + self.optimum)[:, self.coarse]
        return super().value(offsets[:, ~self.coarse]) - lost @ self.WORTH

    def _slopes(self, offsets):
        slopes = super()._slopes(offsets)
        is_there = self.kept(offsets + self.optimum)[:, self.coarse] == 3
        slopes[:, self.coarse] = np.where(is_there, 0.045, -0.045) - self.WORTH
        return slopes


def coarse_search(env, **options):
    """The sizes of the updates, all that was asked for, and the agent."""
    agent, sizes, asked, step = Reinforce(Reinforce.Config(**options)), [], [], env.step
    agent.prior_mean = np.where(env.coarse, 1.0, 0.0)
    env.step = lambda actions: asked.append(np.array(actions)) or step(actions)
    agent.learn(env, seed=0, on_update=lambda update: sizes.append(len(update.rewards)))
    return sizes, np.concatenate(asked), agent


def test_units_that_seem_to_be_worth_keeping_are_not_tried():
    env = CoarseEnv(8, 12, 64)
    env.WORTH = np.full(6, 0.05)
    _, asked, agent = coarse_search(env)
    assert (env.kept(np.concatenate([asked, agent.recommend(OBSERVATION)]))[:, env.coarse] == 3).all()


def test_slopes_with_and_without_a_unit_tell_whether_it_can_go():
    """Two are tried at a time, those that promise most: 1 and 3, then 5 and 0, of which 0 stays."""
    env = CoarseEnv(8, 12, 160, noise=0.01)
    sizes, asked, agent = coarse_search(env)
    assert sizes == [1] * 160
    kept = env.kept(asked)[:, env.coarse]
    assert (kept[:32] == 3).all()
    assert np.ptp(kept[32:96], axis=0).tolist() == [0, 1, 0, 1, 0, 0]
    assert np.ptp(kept[96:], axis=0).tolist() == [1, 0, 0, 0, 0, 1]
    assert (kept[-20:] == [3, 2, 3, 2, 3, 2]).all(), "what is clear is no longer in doubt"
    recommended = [env.kept(each)[env.coarse].tolist() for each in agent.recommend(OBSERVATION)]
    assert recommended == [[3, 2, 3, 2, 3, 2], [3, 2, 3, 2, 3, 2], [3] * 6], "the finals may undo it"


def test_slopes_of_one_side_alone_say_nothing_of_a_unit():
    trial = SampledUnits(np.ones(3, bool), np.full(3, 3), np.full(3, 3), np.ones(3, bool), np.full((5, 3), 0.1))
    assert trial.tried.all(), "all promise the same"
    assert trial.clearness.tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    drawn = np.rint((np.stack([trial.draw(np.zeros(3), rng) for _ in range(400)]) + 1) / 2 * 3)
    assert set(drawn.ravel()) == {2, 3}
    assert abs(drawn.mean() - 2.5) < 0.05, "a coin decides"


def test_the_clearness_of_a_unit_is_in_standard_errors():
    """Slopes 1 and 3 with it, -0.25 and -0.75 without it: means 2 and -0.5, standard errors 1 and 0.25."""
    whole, ones = np.full(1, 3), np.ones(1, bool)
    trial = SampledUnits(ones, whole, whole, ones, np.array([[1.0], [3.0]]))
    for slope in (-0.25, -0.75):
        trial.add(np.full(1, slope), whole - 1)
    np.testing.assert_allclose(trial.clearness, (2 - 0.5) / np.hypot(1, 0.25))
    assert trial.gone().tolist() == [True]
    assert trial.gone(errors=1.5).tolist() == [False]


class ProjectedEnv(CoarseEnv):
    """Actions are projected on a budget, and slopes are noise: nothing is known of units, so that coins always fall."""

    def __init__(self, num_envs, dimensions, tokens, **settings):
        super().__init__(num_envs, dimensions, tokens, **settings)
        layers = range(dimensions // 2)
        pairs = ((Sublayer(i, "attention", 3, 64, 200), Sublayer(i, "mlp", 1000, 1, 1)) for i in layers)
        self.budget = Budget([sublayer for pair in pairs for sublayer in pair])

    def kept(self, actions):
        return np.array([self.budget.project(action, 0.3).kept for action in actions])

    def _slopes(self, offsets):
        noise = self.np_random.choice([-1.0, 1.0], offsets.shape) * self.np_random.uniform(0.5, 1.5, offsets.shape)
        return np.where(self.coarse, noise, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_sublayer_stays_whole_while_units_of_others_go_and_come(seed):
    """The projection gives the other sublayers more, then less: what is whole takes no part in either."""
    env = ProjectedEnv(8, 12, 160)
    prior = env.kept(np.where(env.coarse, 1.0, [[1.0, 1.0] + 5 * [0.0, -0.2]]))[0]
    assert prior[1] == 1000
    agent = Reinforce()
    agent.prior_mean = 2 * prior / env.units - 1
    agent.learn(env, seed=seed, on_update=lambda update: None)
    kept = env.kept(np.stack(agent.recommend(OBSERVATION)))
    assert kept[0, 1] == 1000
    assert kept[2].tolist() == prior.tolist(), "the finals may undo it"


def test_over_a_range_of_budgets_all_tokens_follow_slopes():
    env, agent, sizes = BudgetRangeEnv(8, 6, 32), Reinforce(), []
    agent.budgets = env.budgets
    agent.learn(env, seed=0, on_update=lambda update: sizes.append(len(update.rewards)))
    assert sizes == [1] * 32


@pytest.mark.parametrize("missing", ["has_slopes", "slopes_lead"])
def test_explores_everything_where_slopes_are_missing_or_lead_elsewhere(missing):
    env = SeparableEnv(8, 6, 64)
    setattr(env, missing, False)
    sizes = []
    agent = Reinforce()
    agent.learn(env, seed=0, on_update=lambda update: sizes.append(len(update.rewards)))
    assert sizes == [8] * 8


@pytest.mark.parametrize(
    ("option", "value"), [("learning_rate", 3.0), ("spread", 0.4), ("smooth", 0.0), ("average", 0.0)]
)
def test_an_option_that_does_nothing_where_slopes_are_followed_says_so(option, value):
    def found(env, **options):
        _, asked, agent = coarse_search(env, **options)
        return np.concatenate([asked, agent.recommend(OBSERVATION)])

    def is_used(make, **options):
        return not np.array_equal(found(make(), **options), found(make(), **options, **{option: value}))

    def tries_units():
        return CoarseEnv(8, 12, 160, noise=0.01)

    def follows_slopes():
        env = CoarseEnv(8, 12, 64)
        env.WORTH = np.full(6, 0.05)
        return env

    assert is_used(tries_units, slopes=False)
    said = "used only where all tokens explore" in Reinforce.Config.model_fields[option].description
    assert [is_used(tries_units), is_used(follows_slopes)] == [not said] * 2


# the exploration


@pytest.mark.parametrize("smooth", [0.0, 0.7, 1.0])
def test_the_covariance_is_one_and_moves_nothing_alike(smooth):
    covariance = depth_covariance(20, smooth=smooth)
    np.testing.assert_allclose(covariance, covariance.T)
    np.testing.assert_allclose(covariance.sum(axis=0), 0, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > -1e-12
    root = square_root(covariance)
    np.testing.assert_allclose(root @ root, covariance, atol=1e-12)


def test_neighbours_of_one_kind_share_their_noise_and_the_rest_is_private():
    covariance = depth_covariance(60, smooth=0.7)
    attention = covariance[28]
    assert attention[28] > attention[30] > attention[34] > attention[58], "less over more layers"
    assert attention[30] > 0.5
    assert attention[29] < 0, "attention and MLP share nothing; what moves all alike is taken out"
    private = depth_covariance(60, smooth=0.0)
    np.testing.assert_allclose(private, np.eye(60) - 1 / 60, atol=1e-12)


def test_what_is_asked_has_that_covariance():
    agent, observations = begun(dimensions=8, batch=60_000)
    found = np.cov(agent.ask(observations).T / 0.15)
    np.testing.assert_allclose(found, depth_covariance(8, smooth=0.95), atol=0.02)
