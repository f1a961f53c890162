import math

import pytest

from ffgym.config.tables import RunConfig
from ffgym.tracking.names import SHORT_NAMES, Result, parameters


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


def test_a_rule_in_one_shot_is_called_after_its_heuristic():
    flat = {"agent": {"name": "one-shot"}, "prior": {"name": "owl"}}
    assert parameters(flat)["agent"] == "owl"


def test_a_plugin_may_call_its_options_as_it_likes():
    options = {"random (wide)": 1, "50 % + 2, a=b": 2, "größe": 3}
    wanted = {"random _wide_": "1", "50 _ _ 2_ a_b": "2", "größe": "3"}
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
