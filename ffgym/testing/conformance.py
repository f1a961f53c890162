"""Conformance tests for plugin authors: subclass one, say how to make the plugin, run pytest.

    from ffgym.testing.conformance import CriterionConformance

    class TestMyCriterion(CriterionConformance):
        def make(self):
            return MyCriterion()

Every test is a promise that ffgym relies on; its failure message says which.
"""

from __future__ import annotations

import inspect
import math
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from ffgym.config.tables import table_model
from ffgym.costs.resource import Costs, Resource, costs_of, standard_resources
from ffgym.evaluation.perplexity import check_logits
from ffgym.export.checkpoint import save_pruned
from ffgym.models.cut import PrunableModel, check_cutting, check_sorting
from ffgym.models.families import register
from ffgym.models.walk import Walk
from ffgym.plugins import manager
from ffgym.plugins.bases import (
    MEASUREMENTS,
    STATISTICS,
    Agent,
    BatchAgent,
    Criterion,
    Heuristic,
    Plugin,
    PluginConfig,
    Reward,
)
from ffgym.plugins.contracts import check_importance, check_objectives, check_reward, check_scores, check_state
from ffgym.plugins.discovery import check_class
from ffgym.plugins.kinds import KINDS, imported
from ffgym.pruning.ordering import unit_scores
from ffgym.testing.models import tiny_model
from ffgym.testing.toys import QuadraticEnv, ToyEnv, toy_stats, toy_views
from ffgym.types import Evaluation, LayerStats, Sublayer, Update

P = TypeVar("P", bound=Plugin)

FOLLOWED = ("loss", "kl", "reverse_kl", None)
"""What a reward may fall with."""

WITHOUT_OPTIONS = ("calibration", "corpus", "family", "metric", "resource")
"""Kinds that no table or command holds options of."""

TYPES: dict[type, Any] = {
    bool: bool,
    int: int,
    str: str,
    float: (int, float),
    tuple: (tuple, list),
    frozenset: (set, frozenset),
    dict: Mapping,
}
"""What an attribute must be, by the type of the base class's value."""

METRIC_NAME = re.compile(r"\w[\w\-.:/ ]{,199}", re.ASCII)
"""What MLflow takes as the name of a metric."""


class PluginConformance(ABC, Generic[P]):
    """What every plugin promises."""

    @abstractmethod
    def make(self) -> P:
        """Make a fresh instance of the plugin under test."""

    def test_has_a_name(self) -> None:
        """Names become keys, folders and file names."""
        plugin = self.make()
        check_class(plugin.kind, type(plugin))
        means_none = plugin.kind in ("heuristic", "recovery") and plugin.name == "none"
        assert not means_none, "a configuration that names it means none"

    def test_its_options_can_be_given(self) -> None:
        """The fields of ``Config`` are new keys of the plugin's table, and their defaults are of their types."""
        plugin = self.make()
        config, table = type(plugin).Config, KINDS[plugin.kind].table
        assert issubclass(config, PluginConfig), "Config is not a subclass of ffgym.PluginConfig"
        assert not (plugin.kind in WITHOUT_OPTIONS and config.model_fields), f"no {plugin.kind} can be given options"
        taken = config.model_fields.keys() & {"name", *(table_model(table).model_fields if table else ())}
        assert not taken, f"its table has these keys already: {taken}"
        try:
            config()
        except ValidationError as error:
            if wrong := [item for item in error.errors() if item["type"] != "missing"]:
                pytest.fail(f"a default is wrong: {wrong}")

    def test_its_methods_take_what_ffgym_passes(self) -> None:
        """A method has the parameters of its base class's, with the same names where they are passed by name."""
        plugin = self.make()
        base = imported(KINDS[plugin.kind].base)
        for name, method in inspect.getmembers(base, inspect.isfunction):
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            asked = inspect.signature(method).parameters.values()
            by_name = {each.name: None for each in asked if each.kind is each.KEYWORD_ONLY}
            try:
                own = inspect.signature(getattr(type(plugin), name))
                own.bind(*[None] * (len(asked) - len(by_name)), **by_name)
            except TypeError as error:
                pytest.fail(f"ffgym calls {name}{inspect.signature(method)}: {error}")

    def test_its_attributes_have_their_types(self) -> None:
        """Those of its base class, on the class or set in ``__init__``; a tuple of one name ends in a comma."""
        plugin = self.make()
        base = imported(KINDS[plugin.kind].base)
        for name in (name for name in dir(base) if not name.startswith("_")):
            value, default = getattr(plugin, name), getattr(base, name)
            if type(default) not in TYPES or (name, value) == ("kv_heads", None):
                continue
            expected = TYPES[type(default)]
            assert isinstance(value, expected), f"{name} is {value!r}, not of type {type(default).__name__}"
            if isinstance(value, tuple | list):
                assert all(isinstance(each, str) for each in value), f"{name} is {value!r}, not names"
        assert plugin.edition >= 1, "editions count from 1"

    def test_config_refuses_unknown_keys(self) -> None:
        """A typing error in the TOML is an error, not a silent default."""
        with pytest.raises(ValidationError):
            type(self.make()).Config.model_validate({"a_key_that_nobody_has": 1})

    def test_takes_its_config(self) -> None:
        """A run makes the plugin as ``cls(config)``: an ``__init__`` of its own takes ``config`` and hands it on."""
        plugin = self.make()
        assert type(plugin)(plugin.config).config is plugin.config, "__init__ calls super().__init__(config)"


class CriterionConformance(PluginConformance[Criterion]):
    """What every criterion promises."""

    sublayer: ClassVar[Sublayer] = Sublayer(0, "mlp", 24, 1, unit_params=36, unit_macs=36)
    outputs: ClassVar[int] = 12

    def weight(self) -> torch.Tensor:
        """A consumer's weight, shape (outputs, channels)."""
        return torch.randn(self.outputs, self.sublayer.channels, generator=torch.Generator().manual_seed(3))

    def stats(self) -> LayerStats:
        """Only what the criterion's ``needs`` asks for."""
        return toy_stats(self.sublayer.channels, self.outputs, self.make().needs)

    def channel_scores(self, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
        """Let a fresh instance score, checked by the contract; shape (channels,)."""
        return unit_scores(check_scores(self.make(), weight, stats, self.sublayer), 1)

    def test_scores_keep_the_contract(self) -> None:
        """Right shape, finite, nothing read that ``needs`` does not name."""
        assert self.make().needs <= STATISTICS, f"statistics are {sorted(STATISTICS)}"
        self.channel_scores(self.weight(), self.stats())

    def test_leaves_what_it_is_given_unchanged(self) -> None:
        """Weight and statistics are the run's own."""
        weight, stats = self.weight(), self.stats()
        with unchanged(weight, stats):
            self.make().score(weight, stats)

    def test_same_input_same_scores(self) -> None:
        """Bit-equal, whatever the global random state."""
        torch.manual_seed(0)
        first = self.channel_scores(self.weight(), self.stats())
        torch.manual_seed(1)
        second = self.channel_scores(self.weight(), self.stats())
        assert torch.equal(first, second), "the same weight and statistics gave other scores"

    def test_scores_follow_a_permutation_of_channels(self) -> None:
        """A channel's score does not depend on where it stands."""
        order = torch.randperm(self.sublayer.channels, generator=torch.Generator().manual_seed(5))
        scores = self.channel_scores(self.weight(), self.stats())
        permuted = self.channel_scores(self.weight()[:, order], _permuted(self.stats(), order))
        torch.testing.assert_close(permuted, scores[order], rtol=1e-3, atol=1e-5 * float(scores.abs().max()))


class HeuristicConformance(PluginConformance[Heuristic]):
    """What every heuristic promises."""

    @pytest.mark.parametrize("layers", [1, 4, 30])
    def test_importances_keep_the_contract(self, layers: int) -> None:
        """Shape (2L,), finite, in [-1, 1], also for a model with one layer."""
        assert self.make().needs <= STATISTICS, f"statistics are {sorted(STATISTICS)}"
        check_importance(self.make(), toy_views(layers, self.make().needs))

    def test_leaves_what_it_is_given_unchanged(self) -> None:
        """Weights and statistics are the run's own."""
        views = toy_views(4, self.make().needs)
        with unchanged(*views, *(view.stats for view in views)):
            self.make().importance(views)

    def test_takes_weights_in_bfloat16(self) -> None:
        """Weights are in the model's dtype, which numpy and many of torch's decompositions may not know."""
        views = toy_views(4, self.make().needs)
        check_importance(self.make(), [replace(view, weight=view.weight.bfloat16()) for view in views])

    def test_same_input_same_importances(self) -> None:
        """Bit-equal, whatever the global random state."""
        views = toy_views(4, self.make().needs)
        answers = []
        for state in (0, 1):
            torch.manual_seed(state)
            np.random.seed(state)
            answers.append(check_importance(self.make(), views))
        assert np.array_equal(answers[0], answers[1]), "the same sublayers got other importances"


class RewardConformance(PluginConformance[Reward]):
    """What every reward promises."""

    def evaluation(self, loss: float, dense: float = 3.0) -> Evaluation:
        """What the reward's ``needs`` asks for, of a model with this loss in nats per token: the higher, the worse.

        Divergences are what the loss is above dense, accuracy falls with the loss, the cost is the same for all.
        """
        reward = self.make()
        apart = (max(0.0, loss - dense),) * 3
        return Evaluation(
            (loss,) * 3,
            128,
            kls=apart if "kl" in reward.needs else None,
            reverse_kls=apart if "reverse_kl" in reward.needs else None,
            accuracy=1 / (1 + loss) if "accuracy" in reward.needs else None,
            costs=dict.fromkeys(reward.resources or standard_resources(), 100.0) if "cost" in reward.needs else None,
        )

    def reward(self, pruned: float, dense: float = 3.0) -> float:
        """Reward of constant losses in nats per token, checked by the contract."""
        return check_reward(self.make(), self.evaluation(pruned, dense), self.evaluation(dense, dense))

    def test_objectives_have_fixed_names_and_finite_values(self) -> None:
        """A run compares candidates objective by objective."""
        dense = self.evaluation(3.0)
        named = [check_objectives(self.make(), self.evaluation(loss), dense) for loss in (3.0, 3.5, 100.0)]
        assert len({tuple(objectives) for objectives in named}) == 1, f"the names differ: {named}"
        check_metric_names(named[0])

    def test_says_what_it_is_made_of(self) -> None:
        """Measurements that there are, examples to measure them on, a finite ``worst``, and what it falls with."""
        reward = self.make()
        assert reward.needs <= MEASUREMENTS, f"measurements are {sorted(MEASUREMENTS)}"
        assert reward.examples >= 1, "an episode has at least one example"
        assert math.isfinite(reward.worst), "worst is a finite number: it is a reward, too"
        assert reward.falls_with in FOLLOWED, f"falls_with is one of {FOLLOWED}"
        assert reward.falls_with in (None, "loss", *reward.needs), "falls_with is a divergence that needs does not name"

    def test_finite_for_every_finite_loss(self) -> None:
        """Also for a broken model: nats per token far beyond the vocabulary's logarithm. ``worst`` is the floor."""
        for loss in (0.0, 1.0, 3.0, 10.0, 100.0, 1000.0):
            self.reward(loss)

    def test_lower_loss_never_earns_less(self) -> None:
        """Higher is better."""
        rewards = [self.reward(loss) for loss in (2.5, 3.0, 3.1, 3.5, 5.0, 11.0)]
        assert rewards == sorted(rewards, reverse=True), f"losses rise, rewards do not fall: {rewards}"

    def test_same_input_same_reward(self) -> None:
        """Bit-equal."""
        assert self.reward(3.3) == self.reward(3.3)


class ResourceConformance(PluginConformance[Resource]):
    """What every resource promises, on tiny models with an MLP, with one unit an attention, and with experts."""

    families: ClassVar[tuple[str, ...]] = ("llama", "olmo2", "mixtral")

    def costs(self, family: str) -> Costs:
        """What a tiny model costs, checked by the contract."""
        return costs_of(self.make(), tiny_model(family), context=64)

    def test_units_cost_something(self) -> None:
        """Finite numbers, 0 or more, that rise with the units kept, and not all of them 0."""
        for family in self.families:
            self.costs(family)

    def test_leaves_the_model_unchanged(self) -> None:
        """The run goes on with it: the same weights, in eval mode."""
        for family in self.families:
            model, expected = tiny_model(family), tiny_model(family).state_dict()
            costs_of(self.make(), model, context=64)
            weights = model.state_dict()
            assert weights.keys() == expected.keys(), "it changed the model's parts"
            assert all(torch.equal(weights[name], expected[name]) for name in weights), "it changed the model's weights"
            assert not any(module.training for module in model.modules()), "it left the model in training mode"

    def test_a_measurement_is_taken_from_its_file(self, tmp_path: Path) -> None:
        """A resumed run gets the file that the run kept, and so has the same costs (resources that are measured)."""
        if not self.make().is_measured():
            pytest.skip("has a price per unit")
        first = self.costs("llama")
        assert first.measurement is not None, "the contract says so"
        (tmp_path / "measured.json").write_text(first.measurement.text, encoding="utf-8")
        again = costs_of(self.make(), tiny_model("llama"), context=64, file=tmp_path / "measured.json")
        assert again.measurement is not None, "the contract says so"
        assert again.measurement.digest == first.measurement.digest, "the same measurement has another digest"
        assert all(map(np.array_equal, again.tables, first.tables)), "the file gives other costs"


class AgentConformance(PluginConformance[Agent]):
    """What every agent promises, on a toy problem with a known optimum."""

    _finished: ClassVar[tuple[Agent, ToyEnv, list[Update]]]
    _handed_out: ClassVar[list[tuple[np.ndarray, np.ndarray]]]

    def environment(self) -> ToyEnv:
        """Make a fresh problem: 6 importances, 8 episodes an update, a budget of 30 updates, noisy rewards."""
        return QuadraticEnv(num_envs=8, dimensions=6, tokens=240, noise=0.02)

    def ready(self) -> Agent:
        """A fresh instance with what the runner would have given it."""
        agent = self.make()
        if type(agent).needs_prior:
            agent.prior_mean = np.zeros(self.environment().optimum.size)
        return agent

    def learned(self, env: ToyEnv) -> tuple[Agent, ToyEnv, list[Update]]:
        """A whole search with seed 0: the agent, its environment, and the updates that it reported."""
        agent, updates = self.ready(), list[Update]()
        env.slope_episodes = agent.slope_episodes
        agent.learn(env, seed=0, on_update=updates.append)
        return agent, env, updates

    def finished(self) -> tuple[Agent, ToyEnv, list[Update]]:
        """That search, run once for all tests that only look at it."""
        own = type(self)
        if "_finished" not in vars(own):
            np.random.seed(0)
            torch.manual_seed(0)
            env = self.environment()
            own._handed_out = _witnessed(env)
            own._finished = self.learned(env)
        return own._finished

    def test_reports_every_update(self) -> None:
        """Progress bars and trackers hear of every update, in order, with all its rewards and finite numbers."""
        _, env, updates = self.finished()
        assert [update.index for update in updates] == list(range(len(updates))), "indices count from 0"
        assert sum(len(update.rewards) for update in updates) == env.tokens_spent, "one report for every env.step"
        for update in updates:
            assert np.ndim(update.rewards) == 1, "rewards have shape (episodes,)"
            assert all(np.isfinite(value) for value in update.diagnostics.values()), "diagnostics are finite numbers"
            check_metric_names(update.diagnostics)

    def test_spends_the_budget(self) -> None:
        """A search goes on until ``tokens_left`` is 0; an agent that does not search may stop earlier."""
        agent, env, updates = self.finished()
        assert updates, "there is at least one update"
        if type(agent).searches:
            assert env.tokens_left == 0, f"{env.tokens_left} tokens are left"

    def test_same_seed_same_search(self) -> None:
        """Bit-equal rewards, whatever the global random state."""
        _, _, first = self.finished()
        np.random.seed(1)
        torch.manual_seed(1)
        _, _, again = self.learned(self.environment())
        rewards, repeated = ([update.rewards for update in updates] for updates in (first, again))
        assert len(rewards) == len(repeated), "the same seed gave another search"
        same = map(np.array_equal, rewards, repeated)
        assert all(same), "the same seed gave another search"

    def test_leaves_what_it_is_told_unchanged(self) -> None:
        """Observations and rewards belong to the environment, whose log and other listeners still use them."""
        self.finished()
        for given, before in type(self)._handed_out:
            assert np.array_equal(given, before), "it changed observations or rewards in place: copy them first"

    def test_recommends_importances(self) -> None:
        """What it believes in are actions: shape (2L,), finite, in [-1, 1]; at most ``recommendations`` of them."""
        agent, env, _ = self.finished()
        recommended = agent.recommend(np.array([0.2, 1.0], dtype=np.float32))
        assert len(recommended) <= agent.recommendations, "it recommends more than `recommendations`"
        for action in recommended:
            assert np.shape(action) == env.optimum.shape, f"a recommendation has shape {np.shape(action)}"
            assert np.all(np.abs(action) <= 1), "a recommendation is finite and in [-1, 1]"

    def test_state_is_plain_data(self) -> None:
        """State can be saved without pickling: numbers, strings, numpy arrays, lists and dicts of them."""
        check_state(self.finished()[0])

    def test_takes_up_a_state(self) -> None:
        """A fresh instance believes in what the state says, and searches on from there (agents with a state).

        In the order of a run: the state is taken up before the search begins, so ``begin`` must not undo it.
        """
        agent, env, _ = self.finished()
        if not agent.state():
            pytest.skip("has no state")
        fresh = self.ready()
        fresh.load_state(check_state(agent))  # as a run stores it: arrays come back as lists
        observation = np.array([0.2, 1.0], dtype=np.float32)
        recommended, expected = fresh.recommend(observation), agent.recommend(observation)
        if isinstance(fresh, BatchAgent):
            fresh.begin(dimensions=env.optimum.size, batch=env.num_envs, seed=99)
            recommended = fresh.recommend(observation)
        assert len(recommended) == len(expected), "it recommends otherwise"
        for ours, theirs in zip(recommended, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg="it recommends otherwise")


class FamilyConformance(PluginConformance[Plugin]):
    """What a family promises of its tiny model: set ``family`` to its name, with the package that has it installed."""

    family: ClassVar[str]
    ids: ClassVar[torch.Tensor] = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))

    def make(self) -> Plugin:
        """The installed family."""
        family: Plugin = manager.create("family", self.family)
        return family

    def test_order_of_units_does_not_matter(self) -> None:
        """Sorting units by their scores leaves the function as it was."""
        check_sorting(self._prunable(), self.ids)

    def test_runs_with_a_unit_less(self) -> None:
        """Nothing in the model still counts on the dense number of heads or channels."""
        check_cutting(self._prunable(), self.ids)

    @pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
    def test_pruning_equals_masking(self, share: float) -> None:
        """Without some units a model computes what it does when their consumer columns are zeros.

        Experts have no consumer: without some, a router's logits are minus infinity for them.
        """
        prunable, masked = self._prunable(), self._prunable()
        kept = self._kept(prunable, share)
        for half, units in zip(masked.halves, kept, strict=True):
            if half.sublayer.kind == "experts":
                layer = masked.family.layers(masked.model)[half.sublayer.layer]
                refuse_experts(masked.family.expert_modules(layer)[1], units)
            else:
                with torch.no_grad():
                    half.consumer.weight[:, units * half.sublayer.channels_per_unit :] = 0
        prunable.cut(kept)
        torch.testing.assert_close(self._logits(prunable), self._logits(masked), rtol=1e-4, atol=2e-4)

    def test_restoring_is_bit_exact(self) -> None:
        """After an episode the dense model is back."""
        prunable = self._prunable()
        dense = self._logits(prunable)
        prunable.cut(self._kept(prunable, 0.4))
        prunable.restore()
        assert torch.equal(self._logits(prunable), dense), "a cut leaves something behind"

    def test_runs_layer_by_layer(self) -> None:
        """Layer by layer, also cut, a model gives the bits of an ordinary call."""
        prunable = self._prunable()
        prunable.cut(self._kept(prunable, 0.4))
        walk = Walk(prunable.model)
        with torch.no_grad():
            walk.enter(self.ids.flip(-1))  # batches of one shape share what layers are given beside hidden states
            entry = walk.enter(self.ids)
            hidden = entry.hidden
            for index in range(len(walk.layers)):
                hidden = walk.layer(index, hidden, entry)
            whole = prunable.model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        last = walk.leave(hidden, entry)
        assert torch.equal(last, whole), "a layer depends on more than its arguments, or these depend on the text"

    def test_losses_are_those_of_the_logits(self) -> None:
        """Losses are computed from the head's weights, so that only what ffgym knows of may change its output."""
        check_logits(tiny_model(self.family), self.ids[0])

    def test_a_saved_model_has_the_same_logits(self, tmp_path: Path) -> None:
        """The checkpoint loads, also with sublayers that are gone, and generates."""
        prunable = self._prunable()
        prunable.cut(self._kept(prunable, 0.4))
        save_pruned(prunable, None, tmp_path / "model")
        register([prunable.family])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            assert torch.equal(loaded(self.ids).logits, self._logits(prunable))
            tokens = [model.generate(self.ids, max_new_tokens=4, do_sample=False) for model in (loaded, prunable.model)]
        assert torch.equal(*tokens)

    def _prunable(self) -> PrunableModel:
        return PrunableModel(tiny_model(self.family))

    def _logits(self, prunable: PrunableModel) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = prunable.model(self.ids, use_cache=False).logits
        return logits

    @staticmethod
    def _kept(prunable: PrunableModel, share: float) -> tuple[int, ...]:
        """A share of the units of every sublayer, but at least one of the first attention, and a token's experts."""
        first, *others = (max(int(share * s.units), s.experts_per_token) for s in prunable.sublayers)
        return (max(1, first), *others)


def refuse_experts(router: torch.nn.Module, first: int) -> None:
    """Let a router give all experts but the first few logits of minus infinity."""
    forward = router.forward

    class Refusing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is linear and args[1] is router.weight:
                result[..., first:] = -torch.inf
            return result

    def refusing(*args: Any, **kwargs: Any) -> Any:
        with Refusing():
            return forward(*args, **kwargs)

    router.forward = refusing


@contextmanager
def unchanged(*given: Any) -> Iterator[None]:
    """Fail where the block changes a tensor in place: one that is given, or an attribute of what is given."""
    lent = [tensor for each in given for tensor in ([each] if torch.is_tensor(each) else vars(each).values())]
    before = [(tensor, tensor.clone()) for tensor in lent if torch.is_tensor(tensor)]
    yield
    for tensor, copy in before:
        assert torch.equal(tensor, copy), "it changed a tensor that it was given in place: compute into a new one"


def check_metric_names(names: Iterable[str]) -> None:
    """Fail where MLflow would refuse a name."""
    for name in names:
        fits = METRIC_NAME.fullmatch(name) and posixpath.normpath(name) == name
        assert fits, f"MLflow refuses the name {name!r}: use letters, digits, spaces and _ - . : / after the first"


def _witnessed(env: ToyEnv) -> list[tuple[np.ndarray, np.ndarray]]:
    """All arrays that a toy hands out from now on, each with a copy of what it held then."""
    handed_out: list[tuple[np.ndarray, np.ndarray]] = []
    step, reset = env.step, env.reset

    def stepped(actions: np.ndarray) -> Any:
        answer = step(actions)
        handed_out.extend((array, array.copy()) for array in answer[:2])
        return answer

    def begun(**options: Any) -> Any:
        answer = reset(**options)
        handed_out.append((answer[0], answer[0].copy()))
        return answer

    env.step, env.reset = stepped, begun  # type: ignore[method-assign]
    return handed_out


def _permuted(stats: LayerStats, order: torch.Tensor) -> LayerStats:
    """The statistics of the same inputs with their channels in another order."""
    return replace(
        stats,
        mean=None if stats.mean is None else stats.mean[order],
        square=None if stats.square is None else stats.square[order],
        second_moment=None if stats.second_moment is None else stats.second_moment[order][:, order],
        gradient=None if stats.gradient is None else stats.gradient[:, order],
    )
