import math

import pytest

from ffgym.config.tables import RunConfig
from ffgym.tracking.names import SHORT_NAMES, Result, earlier_result, parameters, setting


def test_what_people_compare_by_sorts_before_everything_else():
    names = sorted(parameters(RunConfig().model_dump(mode="json")))
    assert names[: len(SHORT_NAMES)] == sorted(SHORT_NAMES.values())
    assert names[:3] == ["agent", "criterion", "episodes"]


def test_what_decides_nothing_is_no_parameter():
    names = parameters(RunConfig().model_dump(mode="json"))
    assert not [
        name for name in names if name.startswith(("toml.output", "toml.tracking", "toml.recover", "toml.sched"))
    ]
    used = RunConfig.model_validate({"recover": {"method": "lora"}, "schedule": {"fidelity": "cubic"}})
    assert {"toml.recover.tokens", "toml.schedule.fidelity"} <= parameters(used.model_dump(mode="json")).keys()


def test_a_plugin_may_call_its_options_as_it_likes():
    options = {"random (wide)": 1, "50 % + 2, a=b": 2, "größe": 3, "50%": 4, "50+": 5}
    wanted = {"random _wide_": "1", "50 _ _ 2_ a_b": "2", "größe": "3", "50_": "4", "50__": "5"}
    assert parameters({"agent": options}) == {f"toml.agent.{name}": value for name, value in wanted.items()}


def test_a_result_says_how_it_compares_with_the_dense_model():
    assert Result(30.0, 20.0, params=7).metrics == {
        "result/perplexity": 30.0,
        "result/ratio_to_dense": 1.5,
        "result/nats_above_dense": pytest.approx(math.log(1.5)),
        "result/params": 7.0,
    }


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_a_model_that_broke_has_a_result_too(perplexity):
    assert not math.isfinite(Result(perplexity, 20.0).metrics["result/nats_above_dense"])


ROWS = {
    "report/perplexity/dense": 20.0,
    "report/perplexity/uniform-ridge": 24.0,
    "report/perplexity/reinforce-plain": 20.5,
    "report/perplexity/reinforce-ridge": 23.0,
    "report/perplexity/reinforce-sequential-ridge": 22.0,
    "report/sparsity_prunable/reinforce-sequential-ridge": 0.1999,
    "report/parameters/reinforce-sequential-ridge": 1e6,
}


@pytest.mark.parametrize(
    ("params", "metrics", "result"),
    [
        ({"agent.name": "reinforce"}, ROWS, Result(22.0, 20.0, 0.1999, 1e6)),
        ({"agent.name": "reinforce"}, {"report/perplexity": 25.0, "report/incumbent": 26.0}, Result(25.0)),
        ({"agent.name": "reinforce"}, {"front/perplexity/reinforce": 40.0, "front/perplexity/a": 3.0}, Result(40.0)),
        (
            {"agent.name": "one-shot", "prior.name": "flap"},
            {"report/perplexity/flap-one-shot-ridge": 28.0, "report/perplexity/uniform-ridge": 1.0},
            Result(28.0),
        ),
        ({"agent.name": "reinforce"}, {"search/perplexity": 52.0}, None),
        ({"title": "a bench"}, {}, None),
    ],
    ids=["run", "cell", "range", "heuristic", "failed", "bench"],
)  # fmt: skip
def test_runs_of_earlier_versions_are_understood(params, metrics, result):
    assert earlier_result(params, metrics) == result


def test_settings_are_found_under_old_and_new_names():
    assert setting({"agent.name": "ppo"}, "agent.name") == setting({"agent": "ppo"}, "agent.name") == "ppo"
    assert setting({"data.window": "64"}, "data.window") == setting({"toml.data.window": "64"}, "data.window") == "64"
    assert setting({}, "agent.name") is None
