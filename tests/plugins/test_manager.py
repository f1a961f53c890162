"""The plugin manager: built-ins by name, third parties in isolation, errors that say what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.errors import ConfigError, PluginError, UnknownNameError
from ffgym.plugins import built_ins, discovery, kinds, manager
from ffgym.prepare import configured
from ffgym.types import PluginRecord

CRITERION = """
import ffgym

class Mine(ffgym.Criterion):
    '''What mine does.

    More about it.
    '''
    name = "{name}"

    class Config(ffgym.PluginConfig):
        power: float = 1.0
        floor: float

    def score(self, weight, stats):
        return weight.abs()

@ffgym.hookimpl
def ffgym_criteria():
    return [Mine]
"""
HOOK = "import ffgym\n@ffgym.hookimpl\ndef ffgym_criteria():\n    return "

Install = Callable[..., None]


def offering(base: str, members: str) -> str:
    """A plugin's module: a class of this base with these members."""
    plural = kinds.KINDS[base.lower()].plural  # type: ignore[index]
    return HOOK.replace("criteria", plural) + f"[type('A', (ffgym.{base},), {{{members}}})]"


def record(package: str) -> PluginRecord:
    return next(row for row in manager.records() if row.package == package)


# built-ins


OPTIONAL = [("agent", "random", "spread"), ("heuristic", "flap", "reference")]


@pytest.mark.parametrize(("kind", "name", "option"), OPTIONAL)
def test_an_empty_text_is_an_option_that_is_not_given(kind: kinds.PluginKind, name: str, option: str) -> None:
    assert getattr(manager.create(kind, name, {option: ""}).config, option) is None


def test_an_empty_text_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"agent\.spread = ''"):
        manager.create("agent", "reinforce", {"spread": ""})


# third parties


def test_installed_plugin_is_found_and_created_with_its_options(install: Install) -> None:
    install("acme-mine", CRITERION.format(name="mine"))
    criterion = manager.create("criterion", "mine", {"floor": 0.5})
    assert criterion.config.floor == 0.5
    assert manager.names("criterion")["mine"] == "What mine does."
    assert str(manager.package_of(criterion)) == "acme-mine 1.0"
    assert record("acme-mine").provides == {"criterion": ["mine"]}
    assert record("acme-mine").failure is None


@pytest.mark.parametrize(
    ("source", "failure"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError"),
        ("x = 1", "implements no hook"),
        (HOOK + "7", "TypeError: 'int' object is not iterable"),
        (HOOK + "[int]", "not a subclass of ffgym.Criterion"),
        (offering("Criterion", "'score': 1"), "ffgym_criteria returned the class A without `name`"),
        (offering("Criterion", "'score': 1, 'name': 'a/b'"), "name is 'a/b', not lower-case letters"),
        (HOOK.replace("ffgym_criteria()", "ffgym_criteria(model)") + "[]", "and none takes an argument"),
        (HOOK.replace("ffgym_criteria", "ffgym_criterions") + "[]", "unknown hook 'ffgym_criterions' in plugin"),
    ],
)
def test_broken_plugin_is_recorded_and_stops_nobody(install: Install, source: str, failure: str) -> None:
    install("acme-broken", source, version="2.5")
    install("acme-mine", CRITERION.format(name="mine"))
    assert manager.create("criterion", "wanda").name == "wanda"
    assert manager.get_class("criterion", "mine").name == "mine"
    row = record("acme-broken")
    assert (row.name, row.version, row.provides) == ("acme-broken-entry", "2.5", {})
    assert failure in str(row.failure)


def test_unknown_name_has_the_near_match_the_list_and_the_broken_plugins(install: Install) -> None:
    install("acme-broken", "raise RuntimeError('boom')")
    with pytest.raises(UnknownNameError) as caught:
        manager.get_class("criterion", "wnada")
    assert "unknown criterion 'wnada'" in str(caught.value)
    assert "Did you mean 'wanda'?" in str(caught.value)
    assert "magnitude, " in str(caught.value)
    assert "acme-broken 1.0 (RuntimeError: boom (" in str(caught.value)


def test_a_class_without_a_name_is_said_to_have_none_where_it_is_asked_for(install: Install) -> None:
    install("acme-mine", offering("Criterion", "'score': 1"))
    for asked in ("a", "acme-mine-entry"):
        with pytest.raises(UnknownNameError, match="the class A without `name`: add one"):
            manager.get_class("criterion", asked)


def test_an_unknown_agent_may_be_a_mistyped_heuristic() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown agent or heuristic 'flapp'") as caught:
        manager.get_class("agent", "flapp")
    assert "Did you mean 'flap'?" in str(caught.value)


def test_two_packages_with_one_name_are_refused_naming_both(install: Install) -> None:
    install("acme-one", CRITERION.format(name="mine"))
    install("acme-two", CRITERION.format(name="mine"))
    with pytest.raises(
        PluginError, match=r"2 installed packages provide criterion 'mine'.*acme-one 1\.0 and acme-two 1\.0"
    ):
        manager.get_class("criterion", "mine")
    assert manager.create("criterion", "wanda").name == "wanda"


def test_a_built_in_wins_over_a_plugin_of_its_name_which_has_failed(install: Install) -> None:
    install("acme-one", CRITERION.format(name="wanda"))
    assert manager.get_class("criterion", "wanda").__module__ == "ffgym.criteria.wanda"
    assert manager.names("criterion")["wanda"] == built_ins.BUILTINS["criterion"]["wanda"].description
    assert "criterion 'wanda' is a built-in, which is used" in str(record("acme-one").failure)


def test_a_built_in_with_the_name_of_an_entry_point_is_said_to_be_used(install: Install, tmp_path: Path) -> None:
    """Whoever improves a copy would think that the change made no difference."""
    install("acme-one", CRITERION.format(name="wanda"))
    (tmp_path / "acme_one-1.0.dist-info" / "entry_points.txt").write_text("[ffgym]\nwanda = acme_one\n")
    discovery.forget()
    said = "criterion 'wanda' is ffgym's own; the plugin 'wanda' of acme-one 1.0 is not used for it"
    assert configured.namesakes(load_config(criterion={"name": "wanda"})) == [said]
    assert configured.namesakes(load_config(criterion={"name": "magnitude"})) == []
    assert "acme_one" not in sys.modules


def test_an_entry_point_that_is_called_like_the_plugin_wins_over_others(install: Install) -> None:
    install("acme-one", CRITERION.format(name="acme-one-entry"))
    install("acme-two", CRITERION.format(name="acme-one-entry"))
    assert str(manager.package_of(manager.get_class("criterion", "acme-one-entry"))) == "acme-one 1.0"
    assert "acme-one-entry" in manager.names("criterion")
    assert record("acme-one").failure is None


def test_plugins_are_imported_when_a_name_of_theirs_or_a_listing_is_asked_for(install: Install) -> None:
    install("acme-lazy", CRITERION.format(name="acme-lazy-entry"))
    install("acme-other", CRITERION.format(name="other"))
    manager.create("criterion", "wanda")
    configured.resolve_agent(load_config(agent={"name": "mlp-first"}))
    assert {"acme_lazy", "acme_other"}.isdisjoint(sys.modules)
    manager.create("criterion", "acme-lazy-entry", {"floor": 1.0})
    assert "acme_other" not in sys.modules
    manager.names("agent")
    assert "acme_other" in sys.modules


def test_a_plugin_that_is_slow_to_import_is_named(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme-slow", "import time\ntime.sleep(2.1)\n" + CRITERION.format(name="slow"))
    manager.names("criterion")
    said = r"plugin 'acme-slow-entry' \(acme-slow 1\.0\) took \d+\.\d s to import"
    assert re.search(said, capsys.readouterr().err)


def test_a_plugin_that_is_asked_for_by_its_entry_point_says_what_it_provides(install: Install) -> None:
    install("acme-mine", CRITERION.format(name="mine"))
    for kind, name in (("criterion", "acme-mine-entry"), ("heuristic", "acme-mine-entry")):
        with pytest.raises(UnknownNameError, match="The plugin of this name provides criterion 'mine'"):
            manager.get_class(kind, name)  # type: ignore[arg-type]
    install("acme-taken", CRITERION.format(name="wanda"))
    with pytest.raises(UnknownNameError, match=r"provides criterion 'wanda' \(criterion 'wanda' is a built-in"):
        manager.get_class("criterion", "acme-taken-entry")


def test_a_failure_names_file_and_line_and_has_a_traceback(install: Install) -> None:
    install("acme-broken", "x = 1\n1 / 0\n")
    assert str(record("acme-broken").failure).startswith("ZeroDivisionError: division by zero (")
    assert str(record("acme-broken").failure).endswith("acme_broken.py, line 2)")
    with pytest.raises(UnknownNameError) as raised:
        manager.get_class("criterion", "acme-broken-entry")
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("The plugin of this name could not be loaded: ZeroDivisionError")
    said = manager.traceback_of("acme-broken-entry")
    assert said.startswith("Traceback")
    assert "1 / 0" in said
    with pytest.raises(
        UnknownNameError, match=r"unknown plugin 'acme-brokn-entry'\n  Did you mean 'acme-broken-entry'"
    ):
        manager.traceback_of("acme-brokn-entry")


AGENT = """
import ffgym

class Mine(ffgym.Agent):
    name = "mine"
    def __init__(self, config=None):
        super().__init__(config)
        self.{attribute} = {value}
    def learn(self, env, *, seed, on_update): ...

@ffgym.hookimpl
def ffgym_agents():
    return [Mine]
"""


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("slope_episodes", -1), ("least_episodes", -1), ("update_episodes", 0), ("recommendations", -1)],
)
def test_impossible_numbers_of_episodes_are_refused_at_creation(install: Install, attribute: str, value: int) -> None:
    install("acme-mine", AGENT.format(attribute=attribute, value=value))
    with pytest.raises(
        PluginError, match=rf"agent 'mine' \(package acme-mine 1\.0\): {attribute} is {value}, not a whole number from"
    ):
        manager.create("agent", "mine")


@pytest.mark.parametrize(
    ("base", "method", "needs"),
    [
        ("Criterion", "score", "'square'"),
        ("Criterion", "score", "frozenset({'squares'})"),
        ("Heuristic", "importance", "['mean']"),
        ("Reward", "__call__", "frozenset({'kls'})"),
    ],
)
def test_needs_that_nobody_measures_are_refused_at_creation(
    install: Install, base: str, method: str, needs: str
) -> None:
    install("acme-mine", offering(base, f"'name': 'mine', '{method}': lambda *_: 0, 'needs': {needs}"))
    with pytest.raises(
        PluginError, match=rf"'mine' \(package acme-mine 1\.0\): needs is {re.escape(needs)}, not a set"
    ):
        manager.create(base.lower(), "mine")  # type: ignore[arg-type]


def test_a_number_of_episodes_may_be_a_property(install: Install) -> None:
    learn = "'learn': lambda self, env, *, seed, on_update: 0"
    members = f"'name': 'mine', '__module__': __name__, {learn}, 'least_episodes': property({{}})"
    install("acme-mine", offering("Agent", members.format("lambda self: 2")))
    assert manager.create("agent", "mine").least_episodes == 2
    install("acme-none", offering("Agent", members.replace("mine", "none").format("lambda self: -1")))
    with pytest.raises(
        PluginError, match=r"agent 'none' \(package .*\): least_episodes is -1, not a whole number from"
    ):
        manager.create("agent", "none")
    install("acme-slip", offering("Agent", members.replace("mine", "slip").format("lambda self: 1 / 0")))
    with pytest.raises(PluginError, match=r"agent 'slip' \(package .*ZeroDivisionError: .*acme_slip\.py, line \d+"):
        manager.create("agent", "slip")


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("update_size", "1 / 0", "failed while saying how many episodes an update has: ZeroDivisionError"),
        ("update_size", "'4'", "update_size returned '4', not a whole number from 1"),
        ("update_cost", "0", "update_cost returned 0, not a whole number from 1"),
    ],
)
def test_updates_of_no_whole_number_of_episodes(install: Install, method: str, answer: str, said: str) -> None:
    learn = "'learn': lambda self, env, *, seed, on_update: 0"
    install("acme-mine", offering("Agent", f"'name': 'mine', {learn}, '{method}': lambda self, n: {answer}"))
    config = load_config(None, agent={"name": "mine"})
    with pytest.raises(PluginError, match=rf"agent 'mine' \(package acme-mine 1\.0\):? {said}"):
        configured.check_agent_fits(config)


def test_environment_variable_chooses_what_is_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme-one", CRITERION.format(name="one"))
    install("acme-two", CRITERION.format(name="two"))
    install("acme-broken", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("FFGYM_LOAD_PLUGINS", "acme-two-entry, acme-one-entry")
    assert {"one", "two"} <= set(manager.names("criterion"))
    assert {row.name for row in manager.records()} == {"built-in", "acme-one-entry", "acme-two-entry"}
    monkeypatch.setenv("FFGYM_LOAD_PLUGINS", "")
    assert [row.name for row in manager.records()] == ["built-in"]
    assert set(manager.names("criterion")) == set(built_ins.BUILTINS["criterion"])
    assert "acme_broken" not in sys.modules


def test_environment_variable_with_an_unknown_plugin_is_reported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_LOAD_PLUGINS", "nobody")
    install("acme-one", CRITERION.format(name="one"))
    (nobody,) = (row for row in manager.records() if row.name == "nobody")
    assert "not installed" in str(nobody.failure)
    assert "acme-one-entry" in str(nobody.failure), "the entry points that are there"
    with pytest.raises(UnknownNameError, match="nobody"):
        manager.get_class("criterion", "mine")


def test_a_plugin_that_prints_leaves_stdout_alone(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme-loud", "print('hello')\n" + CRITERION.format(name="loud"))
    manager.names("criterion")
    assert capsys.readouterr().out == ""


# options


def test_unknown_option_names_table_key_and_near_match(install: Install) -> None:
    install("acme-mine", CRITERION.format(name="mine"))
    with pytest.raises(ConfigError) as caught:
        manager.create("criterion", "mine", {"floor": 1.0, "pwoer": 2.0})
    assert "unknown key 'pwoer' in [criterion]" in str(caught.value)
    assert "Did you mean 'power'? Known in [criterion]: power, floor." in str(caught.value)


def test_missing_and_mistyped_options_name_table_and_key(install: Install) -> None:
    install("acme-mine", CRITERION.format(name="mine"))
    with pytest.raises(ConfigError, match=r"\[criterion\] needs a value for 'floor'"):
        manager.create("criterion", "mine")
    with pytest.raises(ConfigError, match=r"criterion\.floor = 'low': should be a valid number"):
        manager.create("criterion", "mine", {"floor": "low"})


def test_an_option_with_an_alias_is_spelled_out_by_it(install: Install) -> None:
    source = CRITERION.format(name="mine").replace("floor: float", "floor: float = pydantic.Field(alias='least')")
    install("acme-mine", "import pydantic" + source)
    config = load_config(None, criterion={"name": "mine", "least": 0.5})
    spelled_out = configured.with_options(config)
    assert spelled_out.criterion.options == {"power": 1.0, "least": 0.5}
    assert configured.with_options(spelled_out) == spelled_out


def test_options_of_a_heuristic_are_those_of_the_table_prior() -> None:
    with pytest.raises(ConfigError, match=r"prior\.spare_first = -1: should be greater than or equal to 0"):
        manager.create("heuristic", "mlp-first", {"spare_first": -1})
    with pytest.raises(ConfigError, match=r"unknown key 'x' in \[prior\]"):
        manager.create("heuristic", "uniform", {"x": 1})


def test_options_whose_check_breaks_name_the_plugin(install: Install) -> None:
    broken = "\nfrom pydantic import field_validator\n" + (
        "class Checked(ffgym.PluginConfig):\n    floor: float = 0.0\n"
        "    @field_validator('floor')\n    def check(cls, value):\n        return open('/not/there')\n"
        "Mine.Config = Checked\n"
    )
    install("acme-mine", CRITERION.format(name="mine") + broken)
    with pytest.raises(PluginError, match=r"criterion 'mine' .*could not check its options: FileNotFoundError"):
        manager.create("criterion", "mine", {"floor": 1.0})


def test_constructor_that_fails_names_the_plugin(install: Install) -> None:
    install("acme-mine", CRITERION.format(name="mine") + "\nMine.__init__ = lambda self, config: 1 / 0\n")
    with pytest.raises(
        PluginError,
        match=r"criterion 'mine' \(package acme-mine 1\.0\) could not be created: .*acme_mine\.py, line \d+",
    ):
        manager.create("criterion", "mine", {"floor": 1.0})


# a heuristic in the agent's place


def test_no_prior_is_among_the_names_that_a_prior_can_have() -> None:
    with pytest.raises(UnknownNameError) as raised:
        configured.with_options(RunConfig.model_validate({"prior": {"name": "kl"}}))
    assert "mlp-first, none, owl" in str(raised.value.hint)


def test_heuristic_named_as_agent_runs_one_shot_with_that_prior() -> None:
    config = configured.resolve_agent(load_config(None, ["agent.spare_first=2"], agent={"name": "mlp-first"}))
    assert (config.agent.name, config.agent.options) == ("one-shot", {})
    assert (config.prior.name, config.prior.options) == ("mlp-first", {"spare_first": 2})
    assert configured.resolve_agent(config) == config


def test_heuristic_named_as_agent_keeps_the_options_of_its_own_prior_table() -> None:
    values = {"agent": {"name": "mlp-first"}, "prior": {"name": "mlp-first", "spare_last": 2}}
    assert configured.resolve_agent(load_config(**values)).prior.options == {"spare_last": 2}


def test_agents_and_unknown_names_are_left_alone() -> None:
    assert configured.resolve_agent(RunConfig()) == RunConfig()
    unknown = load_config(agent={"name": "nobody"})
    assert configured.resolve_agent(unknown) == unknown


def test_all_options_of_all_plugins_are_spelled_out() -> None:
    config = load_config(agent={"name": "reinforce", "smooth": 0.1}, criterion={"name": "obs"})
    spelled = configured.with_options(config)
    assert spelled.agent.options == {**manager.create("agent", "reinforce").config.model_dump(), "smooth": 0.1}
    assert spelled.criterion.options == {"ridge": 0.001}
    assert spelled.prior.options == {"spare_first": 3, "spare_last": 1}
    assert configured.with_options(spelled) == spelled
    assert configured.with_options(load_config(prior={"name": "none"})).prior.options == {}
    with pytest.raises(ConfigError, match=r"prior\.typo is an option of a plugin, and prior\.name is 'none'"):
        configured.with_options(load_config(None, ["prior.typo=2"], prior={"name": "none"}))
    with pytest.raises(ConfigError, match="unknown key 'lr' in"):
        configured.with_options(load_config(agent={"lr": 1.0}))
    with pytest.raises(UnknownNameError, match="nobody"):
        configured.with_options(load_config(reward={"name": "nobody"}))
