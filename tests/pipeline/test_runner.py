"""A whole run on a small trained model: what it writes, measures and tracks, that it repeats, and how it fails."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import yaml
from glass_runs import (
    EPISODES,
    FILES,
    NO_MODEL,
    PER_UPDATE,
    WINDOW,
    Finished,
    finish,
    glass_config,
    glass_home,
    glass_tables,
    stages_are_announced,
    stopping,
    untimed,
)
from mlflow_store import client, new_store, runs
from printed import printed
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import ffgym
from ffgym.cli import app
from ffgym.config.tables import RunConfig
from ffgym.config.toml import load_config
from ffgym.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FitError,
    ModelError,
    OutputError,
    PluginError,
    TrackingError,
    UnknownNameError,
)
from ffgym.evaluation.perplexity import evaluate
from ffgym.pipeline import task
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.artifacts import run_tags
from ffgym.pipeline.plan import plan_run
from ffgym.pipeline.start import settle
from ffgym.plugins import manager
from ffgym.prepare import configured
from ffgym.prepare.parts import load_parts
from ffgym.report.layout import humane
from ffgym.search.log import read_log
from ffgym.search.policy import read_policy

pytestmark = pytest.mark.usefixtures("only_builtins")

TRACKED = {"enabled": True}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> Finished:
    """The run that most tests look at, tracked and drawn."""
    folder = tmp_path_factory.mktemp("finished")
    new_store(folder / "mlruns")
    with drawing():
        return finish(glass_config(folder, tracking=TRACKED))


@pytest.fixture(scope="module")
def finished_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """``finished_with(**changes)``: a run with other settings, the same one for all who ask for the same."""
    runs: dict[str, Finished] = {}

    def ask(**changes: dict[str, Any]) -> Finished:
        settings = json.dumps(changes, sort_keys=True)
        if settings not in runs:
            runs[settings] = finish(glass_config(tmp_path_factory.mktemp("run"), **changes))
        return runs[settings]

    return ask


# what a run writes


def test_everything_is_written_and_nothing_else(finished: Finished) -> None:
    assert {path.name for path in finished.folder.iterdir()} == FILES
    for name in ("units_kept.png", "reward.png"):
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_written_configuration_is_the_run(finished: Finished) -> None:
    written = load_config(finished.folder / "config.toml")
    assert written == configured.with_options(finished.config)
    assert written.agent.options["smooth"] == 0.95, "a default that moves later is written down"


def test_the_table_has_its_rows(finished: Finished) -> None:
    assert list(finished.rows) == [
        "dense",
        "uniform + ridge",
        "mlp-first + ridge",
        f"best of {EPISODES} near the prior + ridge",
        "reinforce, plain",
        "reinforce + ridge",
    ]
    assert [row.is_found for row in finished.result.table.rows] == [False] * 4 + [True] * 2
    assert [row.is_heuristic for row in finished.result.table.rows] == [False] + [True] * 2 + [False] * 3
    assert all(math.isfinite(row.perplexity) for row in finished.result.table.rows)
    report = json.loads((finished.folder / "report.json").read_text())
    assert [row["perplexity"] for row in report] == [row.perplexity for row in finished.result.table.rows]
    text = (finished.folder / "report.md").read_text()
    assert all(label in text for label in finished.rows)


def test_draws_that_no_prior_guides_are_not_called_near_one(finished_with: Callable[..., Finished]) -> None:
    one = finished_with(prune={"calibration": "none"}, criterion={"name": "random"}, prior={"name": "none"})
    assert f"best of {EPISODES} at random + ridge" in one.rows


def test_the_loss_of_every_window_is_kept_so_that_runs_can_be_compared(finished: Finished) -> None:
    kept = json.loads((finished.folder / "losses.json").read_text())
    assert kept["header"] == finished.result.table.header
    assert kept["windows"] == load_parts(finished.config)[1].report.digest
    assert [row["label"] for row in kept["rows"]] == list(finished.rows)
    for stored, row in zip(kept["rows"], finished.rows.values(), strict=True):
        assert math.exp(np.mean(stored["losses"])) == pytest.approx(row.perplexity)


def test_the_header_says_how_it_was_measured(finished: Finished) -> None:
    header = finished.result.table.header
    for part in ("wiki.txt, report split", "1,008 tokens in windows of 64", "float32, without BOS", "Seed 0"):
        assert part in header
    assert "Search: " not in header, "it read on in the text of the calibration"


def test_the_header_says_how_much_of_a_mixture_a_token_passes_through(tmp_path: Path) -> None:
    shutil.copytree(glass_home() / "glass", tmp_path / "mixture")
    words = AutoConfig.from_pretrained(tmp_path / "mixture").vocab_size
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 16, "num_local_experts": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = MixtralForCausalLM(MixtralConfig(vocab_size=words, max_position_embeddings=128, **sizes, **heads))
    dense.save_pretrained(tmp_path / "mixture")
    config = glass_config(tmp_path, model={"name": str(tmp_path / "mixture")}, agent={"name": "uniform"})
    one = finish(configured.resolve_agent(config))
    for name, model in ("dense", dense), ("pruned", reloaded(one)):
        experts = [layer.mlp.experts for layer in model.model.layers]
        idle = sum((1 - 2 / each.num_experts) * sum(p.numel() for p in each.parameters()) for each in experts)
        passed = humane(model.num_parameters() - idle)
        assert f"A token passes through {passed} of the {name} model's parameters." in one.result.table.header


def test_every_row_is_within_the_budget_and_close_to_it(finished: Finished) -> None:
    dense, *pruned = finished.result.table.rows
    model, _ = load_parts(finished.config)
    smallest = min(s.unit_params for s in task.make_budget(finished.config, model.model).sublayers)
    prunable = (dense.parameters - pruned[0].parameters) / pruned[0].sparsity_prunable
    assert (dense.sparsity_prunable, dense.sparsity_model) == (0.0, 0.0)
    for row in pruned:
        assert 0.2 <= row.sparsity_prunable < 0.2 + smallest / prunable
        assert row.sparsity_model == pytest.approx(1 - row.parameters / dense.parameters)
        assert row.values["macs"] < dense.values["macs"]
        assert row.values["kv"] <= dense.values["kv"]


def test_the_allocation_is_what_the_table_shows(finished: Finished) -> None:
    allocation = json.loads((finished.folder / "allocation.json").read_text())
    assert tuple(allocation["kept"]) == finished.result.found.best.allocation.kept
    assert allocation["sparsity"] == pytest.approx(finished.rows["reinforce + ridge"].sparsity_prunable)
    assert (allocation["resource"], allocation["episodes"]) == ("params", EPISODES)
    assert len(allocation["importance"]) == len(allocation["kept"]) == 8


def test_episodes_are_logged_with_their_tokens(finished: Finished) -> None:
    for name in ("episodes.jsonl", "episodes-random.jsonl"):
        episodes = read_log(finished.folder / name).episodes
        assert [episode.index for episode in episodes] == list(range(EPISODES))
        assert {episode.tokens for episode in episodes} == {2 * WINDOW}
    assert finished.result.found.search_tokens == EPISODES * 2 * WINDOW


def test_the_result_is_printed_with_the_line_that_loads_the_model(finished: Finished) -> None:
    text = printed(finished.result)
    assert "uniform + ridge" in text
    assert f"Saved: {finished.result.table.saved.label}\n" in text
    assert f"from_pretrained('{finished.folder / 'model'}', trust_remote_code=True)" in text
    assert str(finished.result.mlflow_run) in text


def test_the_plan_is_said_first_and_the_stages_are_those_that_it_announced(finished: Finished) -> None:
    assert re.match(r"plan: [\d.]+ k parameters, [\d.]+ MB of memory at the peak \(.* free\), \d+:\d\d", finished.said)
    stages_are_announced(finished.config, finished.said)


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"min_units": 0, "sparsity": 0.5}, "prior": {"name": "owl"}},
        {"search": {"random_baseline": False}},
    ],
    ids=["a prior of its own", "one refit"],
)
def test_stages_of_other_runs_are_those_announced(
    finished_with: Callable[..., Finished], changes: dict[str, Any]
) -> None:
    one = finished_with(**changes)
    stages_are_announced(one.config, one.said)


def test_a_plan_does_not_count_what_an_earlier_run_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    config = settle(glass_config(tmp_path, search={"random_baseline": False}))

    def planned(config: RunConfig) -> dict[str, float]:
        return {stage.name: stage.operations.total for stage in plan_run(config, make_agent(config)).stages}

    before = planned(config)
    finish(config)
    after = planned(config)
    assert after == {**before, "prepare": 0.0, "search": after["search"]}
    assert after["search"] < before["search"]
    for name, value in (("is_available", True), ("device_count", 1), ("mem_get_info", (10**12, 10**12))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    others: list[dict[str, Any]] = [{"criterion": {"name": "random"}}, {"model": {"device": "cuda"}}]
    for other in [*others, {"data": {"bos": "first"}}]:
        assert planned(settle(glass_config(tmp_path, **other)))["prepare"] > 0, other
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "0")
    assert planned(config) == before


# the saved model


def reloaded(one: Finished) -> Any:

    import ffgym.models  # noqa: F401 (registers the classes)

    return AutoModelForCausalLM.from_pretrained(one.folder / "model", dtype="auto").eval()


def check_reloaded(one: Finished) -> None:
    """The saved checkpoint measures, bit for bit, what the table says of the saved refit."""
    _, splits = load_parts(one.config)
    assert evaluate(reloaded(one), splits.report.windows).perplexity == one.result.table.saved.perplexity


def test_the_saved_model_is_the_one_that_was_measured(finished: Finished) -> None:
    check_reloaded(finished)
    last = finished.result.table.saved
    assert finished.result.saved is not None
    assert finished.result.saved.parameters == last.parameters
    assert last.label in (finished.folder / "model" / "README.md").read_text()


# MLflow


@pytest.fixture(scope="module")
def tracked(finished: Finished) -> Any:
    return client(finished.root).get_run(finished.result.mlflow_run)


def test_the_run_is_finished_and_has_its_parameters(finished: Finished, tracked: Any) -> None:
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "out"
    for key, value in (("seed", "0"), ("agent", "reinforce"), ("sparsity", "0.2"), ("toml.data.window", "64")):
        assert tracked.data.params[key] == value
    assert not [key for key in tracked.data.params if re.match(r"toml\.(output|tracking|recover|schedule)\.", key)]
    assert len(runs(finished.root)) == 1


def test_the_policys_step_is_a_metric_by_update_and_its_spread_which_never_changes_is_none(
    finished: Finished, tracked: Any
) -> None:
    history = client(finished.root).get_metric_history(finished.result.mlflow_run, "search/policy/step")
    assert [point.step for point in history] == list(range(PER_UPDATE - 1, EPISODES, PER_UPDATE))
    assert "search/policy/spread" not in tracked.data.metrics


def test_the_result_is_metrics(finished: Finished, tracked: Any) -> None:
    saved, dense = finished.result.table.saved, finished.rows["dense"]
    found = {name: value for name, value in tracked.data.metrics.items() if name.startswith("result/")}
    assert found == {
        "result/perplexity": saved.perplexity,
        "result/ratio_to_dense": pytest.approx(saved.perplexity / dense.perplexity),
        "result/nats_above_dense": pytest.approx(math.log(saved.perplexity / dense.perplexity)),
        "result/sparsity": saved.sparsity_prunable,
        "result/params": saved.parameters,
        "result/search_tokens": finished.result.found.search_tokens,
        "result/seconds": finished.result.found.seconds,
    }


def test_the_page_of_the_run_has_the_table_and_says_how_to_load_and_repeat(finished: Finished, tracked: Any) -> None:
    page = tracked.data.tags["mlflow.note.content"]
    saved = finished.result.table.saved
    assert page.startswith(f"**Perplexity {saved.perplexity:,.2f}")
    assert (finished.folder / "report.md").read_text() in page
    assert f"\nfolder = '{finished.folder / 'model'}'\n" in page
    assert "from_pretrained(folder, trust_remote_code=True)" in page
    assert page.endswith("$ ffgym run --config config.toml --output NEW_FOLDER\n```")
    assert tracked.data.tags["mlflow.source.name"] == "ffgym run"


def test_the_pruned_model_is_a_logged_model_that_mlflow_loads_and_answers_with(
    finished: Finished, tracked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logged,) = client(finished.root).search_logged_models([tracked.info.experiment_id])
    assert logged.source_run_id == tracked.info.run_id
    assert logged.tags["ffgym.folder"] == str(finished.folder / "model")
    assert logged.params["agent"] == "reinforce"
    monkeypatch.chdir(finished.root.parent)
    guide = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    example = guide.partition("```python\n")[2].partition("```")[0].replace("m-0123456789abcdef", logged.model_id)
    namespace: dict[str, Any] = {}
    exec(compile(example, "docs/comparing.md", "exec"), namespace)
    namespace["mlflow"].set_tracking_uri(None)
    weights = {name: tensor for name, tensor in namespace["pipe"].model.state_dict().items() if "down_proj" in name}
    stored = load_file(finished.folder / "model" / "model.safetensors")
    assert weights
    assert all(torch.equal(tensor, stored[name]) for name, tensor in weights.items())
    (store,) = re.findall(r"^\$ MLFLOW_TRACKING_URI=(\S+) mlflow models serve -m models:/", guide, re.MULTILINE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (answer,) = namespace["mlflow"].pyfunc.load_model(f"models:/{logged.model_id}").predict(["Alice"])
    assert answer.startswith("Alice")


def test_the_splits_are_dataset_inputs_with_digests(finished: Finished, tracked: Any) -> None:
    _, splits = load_parts(finished.config)
    inputs = {item.tags[0].value: item.dataset for item in tracked.inputs.dataset_inputs}
    assert set(inputs) == {"calibration", "search", "report"}
    for role, dataset in inputs.items():
        split = getattr(splits, role)
        assert json.loads(dataset.profile)["digest"] == split.digest
        assert split.digest.startswith(dataset.digest)


def test_config_allocation_policy_report_and_pictures_are_artifacts(finished: Finished, tracked: Any) -> None:
    names = {item.path for item in client(finished.root).list_artifacts(tracked.info.run_id)}
    assert names == FILES - {"run.json", "episodes.jsonl", "episodes-random.jsonl", "model"}


def test_the_model_has_the_configuration_beside_it_that_its_card_reruns(finished: Finished) -> None:
    model = finished.folder / "model"
    assert "ffgym run --config config.toml --output NEW_FOLDER" in (model / "README.md").read_text()
    assert (model / "config.toml").read_bytes() == (finished.folder / "config.toml").read_bytes()


def test_the_model_says_what_it_was_made_from(finished: Finished) -> None:
    record = json.loads((finished.folder / "model" / "ffgym.json").read_text())
    data, glass = finished.config.data, str(glass_home() / "glass")
    texts = {"calibrated": data.calibration, "searched": data.search}
    assert record == {"dense": glass, "revision": None, "place": glass, "texts": texts}


def test_its_dtype_and_the_licence_on_its_card_are_the_dense_checkpoints(finished: Finished, tmp_path: Path) -> None:
    dense = shutil.copytree(glass_home() / "glass", tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(dense, dtype="bfloat16").save_pretrained(dense)
    stated = "license: other\nlicense_name: ours\nlicense_link: https://example.org/terms\n"
    (dense / "README.md").write_text(f"---\nbase_model: some/base\n{stated}---\n\n# Dense\n")
    one = finish(glass_config(tmp_path, model={"name": str(dense)}, agent={"name": "uniform"}))
    assert one.result.saved is not None
    assert one.result.saved.parameters == one.result.table.saved.parameters
    for each, width, is_said in ((finished, 4, False), (one, 2, True)):
        assert each.result.saved.bytes == pytest.approx(width * each.result.saved.parameters, rel=0.05)
        assert ("Saved in bfloat16, as the dense checkpoint is." in each.result.table.header) == is_said
    front = yaml.safe_load((one.folder / "model" / "README.md").read_text().split("---")[1])
    assert {key: front[key] for key in front if "license" in key} == yaml.safe_load(stated)
    assert "base_model" not in front, "the dense model is another one"


def test_versions_and_plugins_are_tags(tracked: Any) -> None:
    tags = tracked.data.tags
    for package in ("ffgym", "torch", "transformers"):
        assert tags[f"version.{package}"]
    main = ("agent.reinforce", "criterion.wanda", "reward.perplexity", "heuristic.mlp-first")
    for plugin in (*main, "calibration.ridge", "resource.params"):
        assert tags[f"plugin.{plugin}"].startswith("ffgym ")
    assert (tags["device"], tags["dtype"], int(tags["threads"])) == ("cpu", "float32", torch.get_num_threads())


def test_plugins_that_read_text_and_train_are_tags_too(finished: Finished) -> None:
    texts = finished.config.data.model_copy(update={"calibration": ("demo:c4", "2*mine.txt")})
    recover = finished.config.recover.model_copy(update={"method": "lora"})
    config = finished.config.model_copy(update={"data": texts, "recover": recover})
    env: Any = SimpleNamespace(reward=manager.create("reward", "perplexity"), prices={})
    of: Any = SimpleNamespace(config=config, env=env, loaded=SimpleNamespace(device="cpu", dtype_name="float32"))
    tags = run_tags(of)
    assert {name for name in tags if name.startswith(("plugin.corpus", "plugin.recovery"))} == {
        "plugin.corpus.demo",
        "plugin.recovery.lora",
    }


def test_a_notebook_shows_a_result_as_its_table_and_a_console_in_a_line(finished: Finished) -> None:
    result, report = finished.result, (finished.folder / "report.md").read_text()
    assert result._repr_markdown_() == result.table._repr_markdown_() == report
    saved, dense = result.table.saved, result.table.dense
    figures = f"{saved.label} {saved.perplexity:.2f}, dense {dense.perplexity:.2f}"
    assert repr(result) == f"<RunResult in {finished.folder}: perplexity of {figures}>"
    shown = repr(result.table)
    assert all(f"{label} {row.perplexity:.2f}" in shown for label, row in finished.rows.items())
    assert len(shown) < 600


def test_results_can_be_compared_and_hashed(finished: Finished) -> None:
    again = pickle.loads(pickle.dumps(finished.result))
    assert again.table == finished.result.table
    for name in ("best", "finalists", "history"):
        assert getattr(again.found, name) != getattr(finished.result.found, name), "arrays are not compared"
    assert len({again, finished.result, again.found, finished.result.found}) == 4


# the same again, and other settings


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"calibration": "none"}, "criterion": {"name": "random"}, "prior": {"name": "none"}},
        {"prune": {"calibration": "affine"}},
        {"prune": {"resource": "kv", "sparsity": 0.25}},
        {"prune": {"min_units": 0, "sparsity": 0.5}, "prior": {"name": "owl"}},
        {"prune": {"uniform": True}},
        {"prune": {"uniform": True, "calibration": "affine", "resource": "macs", "align": 8}},
        {"search": {"random_baseline": False}},
        {
            "prune": {"ridge": "auto", "resource": "macs", "align": 32},
            "schedule": {"sparsity": "cubic", "fidelity": "cubic"},
        },
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for table in changes.values() for k, v in table.items()),
)
def test_every_setting_ends_in_a_model_within_its_budget_that_loads(
    finished_with: Callable[..., Finished], changes: dict[str, dict[str, Any]]
) -> None:
    one = finished_with(**changes)
    check_reloaded(one)
    target = one.config.prune.sparsity
    assert one.result.saved is not None
    assert one.result.saved.parameters == one.result.table.saved.parameters  # new biases and all
    for row in one.result.table.rows[1:]:
        assert target - 1e-9 <= row.sparsity_prunable < target + 0.1
    rewards = [episode.reward for episode in one.result.found.history]
    assert len(rewards) >= EPISODES
    assert all(math.isfinite(reward) for reward in rewards)


def test_a_uniform_run_ends_in_a_stock_checkpoint(finished_with: Callable[..., Finished]) -> None:
    one = finished_with(prune={"uniform": True})
    assert list(one.rows) == [
        "dense",
        "uniform + ridge",
        "mlp-first + ridge",
        "reinforce, plain",
        "reinforce + ridge",
    ]
    assert not (one.folder / "episodes-random.jsonl").exists()
    shapes = [c.allocation.kept for c in one.result.found.finalists]
    assert all(len(set(zip(kept[::2], kept[1::2], strict=True))) == 1 for kept in shapes)
    config = json.loads((one.folder / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert not list((one.folder / "model").glob("*.py"))
    assert f"from_pretrained('{one.folder / 'model'}')" in printed(one.result)
    assert "trust_remote_code" not in (one.folder / "model" / "README.md").read_text()


def test_biases_of_an_affine_refit_are_in_the_table_and_in_the_file(finished_with: Callable[..., Finished]) -> None:
    uniform = {"uniform": True, "calibration": "affine", "resource": "macs", "align": 8}
    for prune in ({"calibration": "affine"}, uniform):
        one = finished_with(prune=prune)
        plain, refitted = one.rows["reinforce, plain"], one.rows["reinforce + affine"]
        assert refitted.parameters > plain.parameters
        assert refitted.sparsity_prunable == plain.sparsity_prunable, "the budget does not count them"


def test_a_kv_budget_leaves_the_mlps_whole(finished_with: Callable[..., Finished]) -> None:
    one = finished_with(prune={"resource": "kv", "sparsity": 0.25})
    dense, *pruned = one.result.table.rows
    assert len(set(one.result.found.best.allocation.kept[1::2])) == 1
    assert all(row.values["kv"] == 0.75 * dense.values["kv"] for row in pruned)


@pytest.mark.parametrize("agent", ["random", "pathwise"])
def test_other_agents_run_on_another_text_which_the_header_names(tmp_path: Path, agent: str) -> None:
    """One that is its own baseline, and one whose updates are single episodes with slopes."""
    c4, wiki = (f"{glass_home()}/{name}.txt" for name in ("c4", "wiki"))
    data = {"search": [f"3*{c4}", wiki]}
    one = finish(glass_config(tmp_path, data=data, agent={"name": agent}, output={"save_model": False}))
    assert (
        f"{c4}, 1,024 tokens in windows of 64. Search: 75% {c4} + 25% {wiki}, 2,048 tokens in windows"
        in one.result.table.header
    )
    assert one.rows[f"{agent} + ridge"].is_found
    assert one.result.saved is None
    assert not (one.folder / "model").exists()
    assert "**" not in (one.folder / "report.md").read_text(), "bold is the saved model"
    assert any(label.startswith("best of") for label in one.rows) == (agent != "random")
    # The update that crosses the budget is the last: nobody gets more than one update beyond it.
    spent, budget = one.result.found.search_tokens, EPISODES * 2 * WINDOW
    assert spent < budget + PER_UPDATE * 2 * WINDOW


def test_a_heuristic_runs_in_one_episode_and_the_header_names_the_widths_that_auto_chose(tmp_path: Path) -> None:
    one = finish(configured.resolve_agent(glass_config(tmp_path, prune={"align": "auto"}, agent={"name": "uniform"})))
    assert len(one.result.found.history) == 1
    assert one.result.found.best.origin == "policy"
    labels = ["dense", "mlp-first + ridge", "uniform, plain", "uniform + ridge"]
    assert list(one.rows) == labels, "the rule is measured once, by its own name"
    assert [row.is_heuristic for row in one.rows.values()] == [False, True, False, True]
    assert not any(line.startswith("The result is a heuristic") for line in one.result.table.verdict)
    assert not (one.folder / "reward.png").exists(), "nothing was searched"
    assert "MLPs keep multiples of 4 channels." in one.result.table.header
    assert {kept % 4 for kept in one.result.found.best.allocation.kept[1::2]} == {0}


def test_a_run_may_begin_in_inference_mode(tmp_path: Path) -> None:
    one = configured.resolve_agent(glass_config(tmp_path, agent={"name": "uniform"}, criterion={"name": "taylor"}))
    with torch.inference_mode():
        assert math.isfinite(finish(one).result.table.saved.perplexity)


def test_the_same_seed_is_the_same_run_bit_for_bit_under_autocast_and_with_what_that_run_stored(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = finish(glass_config(tmp_path / "one"))
    for again in (one, finish(glass_config(tmp_path / "next"))):
        assert again.result.table == finished.result.table
        for name in ("allocation.json", "policy.json", "report.json"):
            assert (again.folder / name).read_text() == (finished.folder / name).read_text(), name
        for name in ("episodes.jsonl", "episodes-random.jsonl"):
            assert untimed(again.folder / name) == untimed(finished.folder / name), name


# starting from another run


def test_init_from_a_folder_or_an_mlflow_run_starts_from_its_policy(finished: Finished, tmp_path: Path) -> None:
    kept = {"root": str(finished.root)}
    sources = {"folder": str(finished.folder), "run": str(finished.result.mlflow_run)}
    logs = []
    for name, source in sources.items():
        changes = {"prune": {"sparsity": 0.3}, "search": {"init_from": source, "random_baseline": False}}
        one = finish(
            glass_config(
                tmp_path / name, **changes, tracking=kept, output={"save_model": False, "dir": str(tmp_path / name)}
            )
        )
        logs.append(untimed(one.folder / "episodes.jsonl"))
    assert logs[0] == logs[1]

    agent = manager.create("agent", "reinforce")
    agent.load_state(json.loads((finished.folder / "policy.json").read_text())["state"])
    mean = agent.recommend(np.array([0.3, 1.0], np.float32))[-1]
    first = read_log(tmp_path / "folder" / "episodes.jsonl").episodes
    pair = np.stack([first[0].action, first[PER_UPDATE // 2].action])  # mirrored around the mean
    inside = (np.abs(pair) < 1).all(axis=0)
    assert inside.sum() >= 4
    np.testing.assert_allclose(pair.mean(axis=0)[inside], mean[inside], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "policy .* cannot be read: No such file"),
        ("{", "is no policy, or a damaged one"),
        ('{"agent": "random", "state": {}, "sublayers": ["x"]}', "of agent 'random', this run is 'reinforce'"),
        ('{"agent": "reinforce", "state": {}, "sublayers": ["x"]}', "does not have the form that agent 'reinforce'"),
    ],
)
def test_a_policy_that_cannot_be_taken_up_is_refused_before_anything(
    tmp_path: Path, text: str | None, complaint: str
) -> None:
    source = tmp_path / "earlier"
    if text is not None:
        source.mkdir()
        (source / "policy.json").write_text(text)
    with pytest.raises(ConfigError, match=complaint) as raised:
        finish(glass_config(tmp_path, model=NO_MODEL, search={"init_from": str(source)}))
    assert raised.value.hint
    assert not (tmp_path / "out").exists()


def test_a_policy_for_other_sublayers_is_refused(finished: Finished, tmp_path: Path) -> None:
    policy = json.loads((finished.folder / "policy.json").read_text())
    policy["sublayers"] = policy["sublayers"][:6]
    policy["state"]["weights"] = [row[:6] for row in policy["state"]["weights"]]
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    with pytest.raises(ConfigError, match=r"a policy for 6 sublayers, .*; .*glass has 8, ") as raised:
        finish(glass_config(tmp_path, search={"init_from": str(tmp_path / "policy.json")}))
    assert "same depth" in str(raised.value.hint)


# the output folder


def test_an_occupied_folder_is_refused_unless_it_may_be_overwritten(finished: Finished, tmp_path: Path) -> None:
    out = shutil.copytree(finished.folder, tmp_path / "out")
    for name in ("model-recovered", "model-0.30", "model-0.30-recovered", "model-0.30-recovered.unfinished"):
        (out / name).mkdir()
    with pytest.raises(OutputError, match="exists and is not empty") as raised:
        finish(glass_config(tmp_path, model=NO_MODEL))
    assert "--overwrite" in str(raised.value.hint)
    again = finish(glass_config(tmp_path, search={"random_baseline": False}, output={"overwrite": True}))
    assert {path.name for path in out.iterdir()} == FILES - {"episodes-random.jsonl"}
    check_reloaded(again)


def test_the_random_baseline_takes_no_more_tokens_than_a_short_search(tmp_path: Path) -> None:
    """pathwise may have as few episodes as one with slopes costs, fewer than another update has."""
    short = {"episodes": 4, "episodes_per_update": 8}
    one = finish(glass_config(tmp_path, agent={"name": "pathwise"}, search=short, output={"save_model": False}))
    assert "best of 4 near the prior + ridge" in one.rows


def test_a_run_that_cannot_load_costs_an_earlier_one_nothing(finished: Finished, tmp_path: Path) -> None:
    out = shutil.copytree(finished.folder, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "short.txt").write_text("too short")
    for mistake in (
        {"model": {"name": str(tmp_path / "nowhere")}},
        {"data": {"report": str(tmp_path / "nothing.txt")}},
        {"data": {"report": str(tmp_path / "short.txt")}},
    ):
        with pytest.raises((ModelError, DataError)):
            finish(glass_config(tmp_path, output={"overwrite": True}, **mistake))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("config", [{"prune": {"sparsity": 0.3}}, "run.toml", None])
def test_what_is_no_configuration_is_refused_with_what_to_pass(config: Any) -> None:
    said = f"run takes a RunConfig, and got {type(config).__name__}\n  Pass load_config"
    with pytest.raises(ConfigError, match=said):
        ffgym.run(config)


@pytest.mark.parametrize("progress", [True, False, sys.stderr])
def test_progress_that_is_no_console_is_refused_with_what_to_pass(tmp_path: Path, progress: Any) -> None:
    with pytest.raises(ConfigError, match=r"takes a rich\.console\.Console, and got .*\n.*Console\(quiet=True\)"):
        ffgym.run(glass_config(tmp_path), progress=progress)


@pytest.mark.parametrize(("table", "key"), [("data", "report"), ("model", "name")])
def test_a_missing_text_or_model_is_refused_before_anything_is_made(tmp_path: Path, table: str, key: str) -> None:
    with pytest.raises((DataError, ModelError), match=r"nothing' does not exist"):
        finish(glass_config(tmp_path, **{table: {key: str(tmp_path / "nothing")}}))
    assert not list(tmp_path.iterdir())


def test_a_missing_shard_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    tables = glass_tables(tmp_path / "new", tracking={"enabled": True})
    folder = shutil.copytree(tables["model"]["name"], tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"norm": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelError):
        finish(RunConfig.model_validate({**tables, "model": {**tables["model"], "name": str(folder)}}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["out", "out/below"])
def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write to the output folder") as raised:
        finish(glass_config(tmp_path, output={"dir": str(tmp_path / place)}))
    assert "--output" in str(raised.value.hint)


# bad input: before anything is loaded or measured


def test_a_cache_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = glass_config(tmp_path / "run")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    with pytest.raises(OutputError, match=r"cannot write .*prepared: Not a directory") as raised:
        finish(config)
    assert "FFGYM_CACHE_SIZE=0" in raised.value.hint
    assert "load model" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("table", "value", "near"),
    [
        ("agent", "reinforc", "reinforce"),
        ("criterion", "wnda", "wanda"),
        ("reward", "perplexty", "perplexity"),
        ("prior", "mlp-frst", "mlp-first"),
    ],
)
def test_unknown_names_and_options_fail_before_the_model_is_loaded(
    tmp_path: Path, table: str, value: str, near: str
) -> None:
    with pytest.raises(UnknownNameError, match=f"'{value}'") as raised:
        finish(glass_config(tmp_path, **{"model": NO_MODEL, table: {"name": value}}))
    assert f"Did you mean '{near}'?" in str(raised.value.hint)
    with pytest.raises(ConfigError, match=rf"'colour' in \[{table}\]"):
        finish(glass_config(tmp_path, **{"model": NO_MODEL, table: {"colour": 1}}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prune", [{"resource": "kv", "sparsity": 0.9}, {"sparsity": 0.999}])
def test_a_sparsity_out_of_reach_names_the_range_before_statistics(tmp_path: Path, prune: dict[str, Any]) -> None:
    with pytest.raises(BudgetError) as raised:
        ffgym.run(glass_config(tmp_path, prune=prune), progress=stopping("collect statistics", KeyboardInterrupt()))
    assert str(prune["sparsity"]) in str(raised.value)
    assert "0.5" in str(raised.value) if "resource" in prune else "reach" in str(raised.value)


def test_what_cannot_be_streamed_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    with pytest.raises(ConfigError, match="latency is measured on a model in memory"):
        finish(glass_config(tmp_path, model={"placement": "stream"}, prune={"resource": "latency"}))
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_leaves_no_folder_and_no_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = new_store(tmp_path / "mlruns")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**6, 10**6))
    with pytest.raises(FitError, match="does not fit"):
        finish(glass_config(tmp_path, tracking=TRACKED))
    assert not (tmp_path / "out").exists()
    assert client(root).get_experiment_by_name("ffgym") is None or not runs(root)


def test_a_run_that_cannot_open_mlflow_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("a file")
    with pytest.raises(TrackingError, match="cannot open the MLflow store"):
        finish(glass_config(tmp_path, tracking=TRACKED))
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_saved_model_is_an_error_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="the saved model takes"):
        finish(glass_config(tmp_path))
    assert not (tmp_path / "out").exists(), "no episode was logged"


# failures during the run


REWARD = """
import ffgym

class Sick(ffgym.Reward):
    "A reward that is wrong."
    name = "sick"

    def __call__(self, pruned, dense):
        return float("nan")

@ffgym.hookimpl
def ffgym_rewards():
    return [Sick]
"""


def test_a_plugin_that_breaks_its_contract_is_named_and_the_run_is_failed(
    install: Callable[..., None], tmp_path: Path
) -> None:
    root = new_store(tmp_path / "mlruns")
    install("sick", REWARD)
    with pytest.raises(PluginError) as raised:
        finish(glass_config(tmp_path, reward={"name": "sick"}, tracking=TRACKED))
    assert "reward 'sick' (package sick 1.0)" in str(raised.value)
    assert "returned nan" in str(raised.value)
    (run,) = runs(root)
    assert run.info.status == "FAILED"
    assert run.data.tags["ffgym.failure"].startswith("PluginError: reward 'sick' (package sick 1.0)")


@pytest.mark.parametrize("there", ["nothing", "another run"])
def test_mlflow_names_no_command_that_goes_on_where_nothing_of_this_run_is_left(
    finished: Finished, tmp_path: Path, there: str
) -> None:
    root = new_store(tmp_path / "mlruns")
    if there == "another run":
        shutil.copytree(finished.folder, tmp_path / "out")
    else:
        (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        finish(glass_config(tmp_path, data={"report_tokens": 10**6}, output={"overwrite": True}, tracking=TRACKED))
    (run,) = runs(root)
    assert run.info.status == "FAILED"
    assert "ffgym.resume" not in run.data.tags
    assert "--resume" not in run.data.tags["mlflow.note.content"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("size", "what"), [(1, "config.toml"), (10_000, "episodes.jsonl"), (20_000, "units_kept.png"), (10**6, "model")]
)
def test_a_full_disk_is_an_error_wherever_it_shows(tmp_path: Path, small_files: Any, size: int, what: str) -> None:
    config, said = glass_config(tmp_path, search={"episodes": 32, "random_baseline": False}), io.StringIO()
    said_of = f"cannot write .*{what}: .*File too large"
    with pytest.raises(OutputError, match=said_of) as raised, small_files(size):
        ffgym.run(config, progress=Console(file=said, width=200))
    found = what != "config.toml"
    again = f"ffgym run --resume {tmp_path / 'out'}"
    assert (f"continue where it stopped: {again}" in said.getvalue()) == found
    hint = f"Make room on the disk, or make it writable again, then continue: {again}"
    assert raised.value.hint == (hint if found else "Choose another place.")


# Ctrl-C


@pytest.mark.parametrize(
    ("episode", "saved"),
    [(0, 0), (1, 1), (EPISODES + 3, EPISODES)],
    ids=["before the first episode", "in the first update", "in the random baseline"],
)
def test_ctrl_c_saves_what_was_found_and_marks_the_run_killed(
    tmp_path: Path, steps: list[int], episode: int, saved: int
) -> None:
    root = new_store(tmp_path / "mlruns")
    steps[0] = episode
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        ffgym.run(glass_config(tmp_path, tracking=TRACKED), progress=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    (run,) = runs(root)
    assert run.info.status == "KILLED"
    artifacts = {item.path for item in client(root).list_artifacts(run.info.run_id)}
    out = tmp_path / "out"
    if not saved:
        assert "no episode has ended" in said
        assert not (out / "allocation.json").exists()
        return
    assert {"allocation.json", "policy.json"} <= artifacts
    allocation = json.loads((out / "allocation.json").read_text())
    assert allocation["episodes"] == len(read_log(out / "episodes.jsonl").episodes) == saved
    assert 0.2 <= allocation["sparsity"] < 0.21
    assert re.search(rf"the best of {saved} episodes \(.*, sparsity 20\.\d%\)", said)
    assert str(out / "allocation.json") in said
    # Another run can start from it.
    manager.create("agent", "reinforce").load_state(read_policy(out, "reinforce").state)


# the command


def toml(folder: Path, **changes: dict[str, Any]) -> str:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(glass_tables(folder, **changes)), encoding="utf-8")
    return str(path)


def test_json_is_pure_data_on_stdout(tmp_path: Path) -> None:
    file = toml(tmp_path, search={"random_baseline": False})
    done = CliRunner().invoke(app, ["run", "--config", file, "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["table"][0]["label"] == "dense"
    assert data["allocation"] == json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert data["model"] == str(tmp_path / "out" / "model")
    assert (data["search_tokens"], data["mlflow_run"]) == (EPISODES * 2 * WINDOW, None)
    assert "search: reinforce: done" in done.stderr
