"""A plan: what it counts, what it advises, and what it refuses, all before anything is loaded."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from latency_tables import made_up_table
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.costs.latency_table import to_json
from ffgym.errors import FitError
from ffgym.models.families import family_of
from ffgym.models.loading import DEMO_SIZES, config_of
from ffgym.pipeline.plan import plan_run, planned_steps
from ffgym.plan import counts
from ffgym.plan.counts import PlannedStage
from ffgym.plan.machine import free_memory, measure_speed
from ffgym.plan.plan import Plan
from ffgym.plan.shape import ModelShape, RunLoad, shape_of, skeleton_of
from ffgym.plugins import manager
from ffgym.prepare.planning import placed
from ffgym.pruning.factors import factor_bytes
from ffgym.testing.models import tiny_model
from ffgym.types import Sublayer

CPU = torch.device("cpu")
AUTO = RunConfig()
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
LOAD = RunLoad(
    window=512,
    calibration_tokens=8192,
    targets=(0.2,),
    dtype=torch.bfloat16,
    batch_tokens=4096,
    episode_tokens=2048,
    episodes_per_update=8,
)

LAYER = (Sublayer(0, "attention", units=1, channels_per_unit=64), Sublayer(0, "mlp", units=64, channels_per_unit=1))
ONE_LAYER = ModelShape("llama", parameters=0, hidden=64, vocabulary=1, sublayers=LAYER, context_limit=4096)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")


def folder_of(config: dict[str, Any], place: Path) -> Path:
    """A folder with nothing but a config."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = str(folder_of(LLAMA_8B, tmp_path_factory.mktemp("llama")))
    return shape_of(config_of(folder), folder)


def planned(shape: ModelShape, *, free: float = 1e12, **changes: Any) -> Plan:
    return Plan("model", shape, replace(LOAD, **changes), CPU, int(free), {"calibration": "demo:c4"})


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def as_json(*arguments: str) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def stages_of(*arguments: str) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in as_json(*arguments)["stages"]}


def two_layers(place: Path, **changes: Any) -> str:
    """A folder with nothing but the config of a small Llama."""
    return str(folder_of(LLAMA_8B | {"num_hidden_layers": 2} | changes, place))


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_a_config_gives_the_shape_of_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"  # a download may leave the weights out
    index.write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    shape = shape_of(config_of(str(tmp_path)), "tiny")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.sublayers == tuple(family_of(model).sublayers(model))
    assert shape.hidden == model.config.hidden_size
    made_up_table(model).check_fits(skeleton_of(config_of(str(tmp_path)), "tiny"), context=64, source="its own")


def test_embeddings_may_be_narrower_than_the_layers(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
    folder = folder_of(
        {"model_type": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False, **wide}, tmp_path
    )
    assert shape_of(config_of(str(folder)), "opt").hidden == 64


def test_the_demo_is_planned_from_the_sizes_that_its_file_has() -> None:
    shape = shape_of(config_of("demo"), "demo")
    assert shape.parameters == 134_515_008
    assert len(shape.sublayers) == 2 * int(DEMO_SIZES["num_hidden_layers"])


def test_llama_8b_needs_what_its_sizes_say(eight_billion: ModelShape) -> None:
    assert eight_billion.parameters == 8_030_261_248
    n, m, layers = 14336, 4096, 32
    assert counts.weights(eight_billion, LOAD) == 2 * 8_030_261_248
    assert counts.factors(eight_billion) == layers * (factor_bytes(m, n) + factor_bytes(m, m))
    assert counts.hidden_states(eight_billion, LOAD, 8192) == 2 * 8192 * m


def test_what_costs_more_is_planned_to_cost_more(eight_billion: ModelShape) -> None:
    plan = planned(eight_billion)
    assert planned(eight_billion, dtype=torch.float32).needed > plan.needed
    assert planned(eight_billion, calibration_tokens=2**20).needed > plan.needed
    both = planned(eight_billion, workers=2)
    assert both.needed == both.largest.peak + 2 * both.worker_peak > plan.needed
    assert planned(eight_billion, workers=2, elsewhere=True).needed <= plan.needed
    assert planned(eight_billion, targets=(0.5,)).stages[-1].operations.model < plan.stages[-1].operations.model


@pytest.mark.parametrize(
    ("groups", "arguments", "shares"),
    [
        (8, (), [(1, 2)]),  # an update is one episode of two windows
        (8, ("--set", "search.episode_tokens=8192"), [(1, 8)]),
        (4, (), [(1, 2)]),  # units of the attentions are tried meanwhile
        (4, ("--sparsity", "0.1:0.5"), [(1, 2)]),
        (8, ("--set", "agent.slopes=false"), [(1, 16)]),
        (8, ("--uniform",), [(1, 16)]),  # where nothing has slopes
        (8, ("--reward", "multi-objective", "--set", "reward.accuracy=0"), [(1, 16)]),
        (8, ("--agent", "pathwise"), [(1, 2)]),
        (8, ("--agent", "cma-es"), [(1, 16)]),
        (8, ("--set", "search.random_baseline=true"), [(0.5, 2), (0.5, 16)]),
    ],
)
def test_workers_shorten_a_search_by_the_parts_of_its_updates(
    groups: int, arguments: tuple[str, ...], shares: list[tuple[float, int]], tmp_path: Path
) -> None:
    folder = two_layers(tmp_path, num_key_value_heads=groups)
    settings = ("model.dtype=bfloat16", "search.episodes_per_update=16", "search.random_baseline=false")
    given = [each for one in settings for each in ("--set", one)]

    def seconds(workers: int) -> float:
        """Of the search, in seconds of the report, which no worker shortens."""
        many = ("--workers", str(workers), "--ray-address", "auto")
        taken = stages_of(folder, *given, *many, *arguments)
        return float(taken["search"]["seconds"] / taken["report"]["seconds"])

    # Of 16 parts, the busiest of 6 workers takes 3.
    assert seconds(6) / seconds(1) == pytest.approx(
        sum(share * math.ceil(parts / 6) / parts for share, parts in shares)
    )


def test_a_search_that_workers_shorten_less_is_expected_to_take_longer(tmp_path: Path) -> None:
    config = load_config(
        model={"name": two_layers(tmp_path), "dtype": "bfloat16"}, workers={"count": 8, "ray_address": "auto"}
    )
    plan = plan_run(config, manager.create("agent", config.agent.name, config.agent.options))
    seconds = {step.label: step.seconds for step in planned_steps(config, plan)}
    assert seconds["search: reinforce"] > 2 * seconds["search: random"]
    stages = sum(plan.seconds(stage) for stage in plan.stages if stage.name in ("search", "finals"))
    assert seconds["search: reinforce"] + seconds["search: random"] == pytest.approx(stages)


def test_a_plan_may_come_before_the_run_whose_policy_it_names(tmp_path: Path) -> None:
    as_json(two_layers(tmp_path / "model"), "--init-from", str(tmp_path / "not-run-yet"))


def test_a_model_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folder = str(folder_of(LLAMA_8B, tmp_path / "model"))
    done = call(folder, "--model", "another")
    assert (done.exit_code, "--model already" in done.stderr) == (2, True)
    (tmp_path / "mine.toml").write_text('[model]\nname = "another"\n')
    as_json(folder, "--config", str(tmp_path / "mine.toml"))


def test_what_cannot_fit_is_refused_with_what_it_needs_what_is_free_and_what_helps(eight_billion: ModelShape) -> None:
    needed = planned(eight_billion).needed
    with pytest.raises(FitError) as raised:
        planned(eight_billion, free=needed * 1.5, workers=2).check()
    assert "workers that share it need" in raised.value.message
    assert "are free on cpu" in raised.value.message
    assert raised.value.hint is not None
    assert "--workers 1" in raised.value.hint
    planned(eight_billion, free=needed * 1.05).check()


def test_statistics_that_heuristics_ask_for_are_counted(eight_billion: ModelShape) -> None:
    plain, fisher = (planned(eight_billion, kept=frozenset(kept)) for kept in ((), ("output_gradient",)))
    more = 64 * 4096**2 * 4
    assert counts.store(eight_billion, fisher.load) == counts.store(eight_billion, plain.load) + more
    assert fisher.needed == plain.needed + more


def test_a_criterion_that_inverts_wide_moments_needs_memory_for_them(tmp_path: Path) -> None:
    wanda, obs = (stages_of(two_layers(tmp_path), "--criterion", name)["prepare"] for name in ("wanda", "obs"))
    n, m = LLAMA_8B["intermediate_size"], LLAMA_8B["hidden_size"]
    more = counts.INVERTING * n**2 + counts.INVERTING_WEIGHTS * m * n - counts.FACTORISING_WIDE * n**2
    assert obs["peak"] == wanda["peak"] + more


class TestFourGpus:
    @pytest.fixture(autouse=True)
    def _four(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.folder = str(folder_of(LLAMA_8B, tmp_path))
        for name, value in (
            ("is_available", True),
            ("device_count", 4),
            ("mem_get_info", (23_000_000_000, 24_000_000_000)),
            ("memory_reserved", 0),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def plan(self, device: str, **workers: int) -> Plan:
        model = {"name": self.folder, "dtype": "bfloat16", "device": device}
        config = load_config(model=model, workers=workers)
        return plan_run(config, manager.create("agent", config.agent.name, config.agent.options))

    def test_their_memory_counts_together_where_layers_are_spread_over_them(self) -> None:
        one, spread = self.plan("cuda"), self.plan("balanced")
        assert one.load.streamed
        assert not spread.load.streamed
        assert spread.free == 4 * one.free
        assert spread.stages[0].memory["weights"] == 2 * spread.shape.parameters, "the embeddings too"
        spread.check()

    def test_a_worker_shares_the_first_one_with_this_process(self) -> None:
        eight = self.plan("cuda", count=8)
        assert eight.needed == eight.largest.peak + eight.worker_peak
        spread = self.plan("balanced", count=2, gpus=2)
        assert spread.needed == spread.largest.peak + 2 * spread.worker_peak


def test_advice_names_what_still_needs_too_much(eight_billion: ModelShape) -> None:
    plan = planned(eight_billion, free=1e9, dtype=torch.float32)
    assert "--set model.placement=stream --set model.dtype=bfloat16 it still needs" in plan.advice
    assert "It fits with --set" in planned(eight_billion, free=plan.needed - 1, dtype=torch.float32).advice
    assert planned(eight_billion).advice == ""


def test_the_speed_is_of_the_tokens_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whole windows run: with a clock that goes on by a second a look, one of 3,000 tokens in a second."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    weights, attention = 4 * 64 * 64 + 3 * 64 * 64, 3000 * 64
    assert measure_speed(ONE_LAYER, torch.float32, CPU, 3000).model == 3000 * 2 * (weights + attention)


def test_the_probe_leaves_the_callers_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    measure_speed(ONE_LAYER, torch.float32, CPU, 64)
    assert torch.equal(torch.get_rng_state(), state)


def test_free_memory_follows_the_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    assert free_memory(CPU) > 0
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * 2**30, 3 * 2**30))
    assert free_memory(CPU) == 3 * 2**30


def test_a_control_group_leaves_its_limit_less_what_others_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffgym.plan import machine

    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    for folder, limit, held, cached in (("job", "2000000000", 900_000_000, 400_000_000), ("job/step", "max", 0, 0)):
        (tmp_path / folder / "memory.max").write_text(limit)
        (tmp_path / folder / "memory.current").write_text(str(held))
        (tmp_path / folder / "memory.stat").write_text(f"anon 1\nfile {cached}\n")
    assert list(machine.group_limits(own=100_000_000)) == [1_600_000_000]


# the command


def test_the_command_plans_a_folder_that_holds_only_a_config(tmp_path: Path) -> None:
    plan = as_json("--model", two_layers(tmp_path), "--set", "model.dtype=bfloat16")
    assert plan["family"] == "llama"
    assert plan["texts"]["search"] == "demo:c4"
    assert plan["peak"] == max(stage["peak"] for stage in plan["stages"])
    stages = [stage["stage"] for stage in plan["stages"]]
    assert stages == ["load", "prepare", "search", "finals", "report", "save"]
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))


def test_a_text_that_is_not_there_is_refused_as_a_run_does(tmp_path: Path) -> None:
    result = call(two_layers(tmp_path), "--set", "data.search=nowhere.txt")
    assert result.exit_code == 1
    assert "corpus file or folder 'nowhere.txt' does not exist" in result.stderr


def test_every_point_of_a_range_is_planned_at_its_own_sparsity(tmp_path: Path) -> None:
    folder = two_layers(tmp_path)

    def plan(sparsity: Any, **output: Any) -> Plan:
        model = {"name": folder, "dtype": "bfloat16", "device": "cpu"}
        config = load_config(
            model=model, prune={"sparsity": sparsity}, output=output, search={"random_baseline": False}
        )
        return plan_run(config, manager.create("agent", config.agent.name, config.agent.options))

    def saved(plan: Plan) -> int:
        return counts.saved_models(plan.shape, plan.load)

    def search(plan: Plan) -> PlannedStage:
        return next(stage for stage in plan.stages if stage.name == "search")

    points = [plan(target) for target in load_config(prune={"sparsity": "0.1:0.5"}).targets]
    front, lowest = plan("0.1:0.5", save_all=True), plan("0.1:0.5", save_at=0.1)
    assert saved(front) == sum(map(saved, points))
    assert saved(lowest) == saved(points[0])
    assert search(front).operations.model == pytest.approx(search(plan(0.3)).operations.model)
    assert search(front).memory["refitted consumers"] == search(points[0]).memory["refitted consumers"]


def test_a_saved_model_is_planned_no_wider_than_its_checkpoint(tmp_path: Path) -> None:
    sizes = [
        as_json(two_layers(tmp_path), "--set", f"model.dtype={dtype}")["sizes"]["saved_model_on_disk"]
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] == sizes[1] > 0


def test_finals_of_several_recommendations_are_planned_with_more_tokens(tmp_path: Path) -> None:
    def finals(agent: str) -> int:
        settings = ["model.dtype=bfloat16", f"agent.name={agent}", "search.random_baseline=false"]
        given = (each for one in settings for each in ("--set", one))
        return int(stages_of(two_layers(tmp_path), *given)["finals"]["tokens"])

    assert finals("reinforce") == pytest.approx(finals("pathwise") + 2.5 * 16_384, rel=0.05)


def test_rewards_with_examples_have_longer_episodes_and_finals(tmp_path: Path) -> None:
    stages = partial(stages_of, two_layers(tmp_path), "--set", "model.dtype=bfloat16")

    one = stages()
    weighed = stages("--reward", "multi-objective", "--set", "reward.accuracy=0", "--set", "reward.resource=kv")
    assert [weighed[name]["tokens"] for name in ("search", "finals")] == [
        one[name]["tokens"] for name in ("search", "finals")
    ], "objectives alone take no more"
    asked = stages("--reward", "multi-objective", "--set", "reward.resource=kv")
    assert asked["finals"]["tokens"] > 1.5 * weighed["finals"]["tokens"], "256 examples go with 16 windows"
    assert asked["search"]["peak"] > weighed["search"]["peak"]
    assert asked["search"]["tokens"] == pytest.approx(one["search"]["tokens"], rel=0.2), "examples count as tokens"


def test_the_table_says_what_every_stage_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("some words")
    result = call(two_layers(tmp_path), "--set", "model.dtype=bfloat16", "--set", 'data.search=["demo:c4", "mine.txt"]')
    assert result.exit_code == 0, result.output
    assert "Text: calibration demo:c4, search 50% demo:c4 + 50% mine.txt, report" in result.stdout
    for word in ("prepare", "search", "finals", "report", "refit factors", "prepared model on disk", "are free"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sparsity", "0.99"), "sparsity 0.99"),
        (("--agent", "reinforcee"), "unknown agent"),
        (("--set", "data.window=9000", "--set", "search.episode_tokens=9000"), "context of 2048 tokens"),
    ],
)
def test_what_no_run_would_take_is_refused(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = call(two_layers(tmp_path), *arguments)
    assert result.exit_code == 1
    assert said in result.output


def test_the_table_says_which_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1MB")
    large = tmp_path / "large"
    large.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12 if path == large else 10))
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
    plan = (two_layers(tmp_path / "model", **sizes), "--set", "model.dtype=float32")
    said = " ".join(call(*plan).output.split())
    for word in ("set FFGYM_CACHE to a folder", "all other prepared models would go", "give `ffgym run` a folder"):
        assert word in said
    said = " ".join(call(*plan, "--set", f"output.dir={large / 'new'}").output.split())
    assert "set FFGYM_CACHE to a folder" in said
    assert "The saved model does not fit" not in said


def test_a_config_of_no_layers_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    result = call(two_layers(tmp_path, num_hidden_layers=0))
    assert "num_hidden_layers = 0, not 1 to 10,000" in result.output


STREAMED = ("--set", "model.placement=stream")


class TestPlacement:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--recover", "lora"), "'lora' trains a model in memory"),
            (("--resource", "latency"), "latency is measured on a model in memory"),
            (("--set", "reward.name=multi-objective", "--set", "reward.resource=latency"), "latency is measured on"),
        ],
    )
    def test_what_needs_the_model_in_memory_is_not_streamed(
        self, arguments: tuple[str, ...], said: str, tmp_path: Path
    ) -> None:
        folder = str(folder_of(LLAMA_8B, tmp_path))
        assert said in call(folder, *STREAMED, *arguments).output
        assert "stream=" not in as_json(folder, *arguments)["advice"]

    def test_a_quantised_checkpoint_is_not_streamed(self, tmp_path: Path) -> None:
        codes = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        folder = str(folder_of(LLAMA_8B | {"quantization_config": codes}, tmp_path))
        assert "a quantised checkpoint is dequantised as a whole" in call(folder, *STREAMED).output
        assert "stream=" not in as_json(folder)["advice"]

    def test_nothing_is_streamed_where_the_cache_may_hold_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = str(folder_of(LLAMA_8B, tmp_path))
        monkeypatch.setenv("FFGYM_CACHE_SIZE", "0")
        refused = call(folder, *STREAMED)
        assert "cannot be kept" in refused.output

    def test_layers_are_streamed_where_only_that_fits(self, eight_billion: ModelShape) -> None:
        resident, tight, hopeless = (planned(eight_billion, free=free) for free in (1e12, 20e9, 1e9))
        assert placed(AUTO, resident) == resident
        streamed = placed(AUTO, tight)
        assert streamed.load.streamed
        assert streamed.needed < tight.needed / 3
        assert "--set model.placement=stream" in tight.advice
        assert placed(AUTO, hopeless) == hopeless


# the latency table that a run would count


def planned_latency(model: Any, folder: Path, text: str | None, context: int = 64) -> Any:
    model.config.save_pretrained(folder)
    named = []
    if text is not None:
        (folder / "times.json").write_text(text)
        named = ["--latency-table", str(folder / "times.json")]
    window = ("--set", "data.window=64", "--set", f"prune.context={context}")
    return call(str(folder), "--resource", "latency", *named, *window, "--json")


def test_a_latency_table_of_the_model_is_taken(tmp_path: Path) -> None:
    model = tiny_model("llama")
    done = planned_latency(model, tmp_path, to_json(made_up_table(model)))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("text", "context", "complaint"),
    [
        (to_json(made_up_table(tiny_model("qwen2"))), 64, "another model: family 'qwen2', here 'llama'"),
        (to_json(made_up_table(tiny_model("llama"))), 32, "timed on 64 tokens, prune.context is 32"),
        (to_json(made_up_table(tiny_model("llama")))[:300], 64, "is no latency table, or a damaged one"),
        (None, 4096, "takes at most 128"),
    ],
)
def test_what_a_latency_run_would_refuse_is_refused(
    text: str | None, context: int, complaint: str, tmp_path: Path
) -> None:
    done = planned_latency(tiny_model("llama"), tmp_path, text, context)
    assert (done.exit_code, complaint in done.stderr) == (1, True), done.output


def test_a_latency_table_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    done = call(two_layers(tmp_path), "--resource", "latency", "--latency-table", str(tmp_path / "nope.json"))
    assert (done.exit_code, "nope.json" in done.stderr) == (1, True), done.output
