"""From plain data to an environment, as a run's configuration says."""

from __future__ import annotations

import resource
import shutil

import numpy as np
import pytest
import torch
from made_up_family import FAMILY

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.errors import BudgetError, ConfigError, FitError, ModelError, WorkerError
from ffgym.evaluation.evaluator import Request
from ffgym.pipeline.make_env import make_pruning_env
from ffgym.plugins.discovery import ENVIRONMENT_VARIABLE
from ffgym.prepare.parts import load_parts, make_budget, prepare_model
from ffgym.prepare.workers import EvaluatorMaker, shared_executor
from ffgym.pruning.calibration import RIDGE_GRID
from ffgym.testing.models import tiny_model


def configured(tiny_run, **tables):
    merged = {**tiny_run, **{name: {**tiny_run.get(name, {}), **table} for name, table in tables.items()}}
    return RunConfig.model_validate(merged)


@pytest.mark.parametrize("size", ["1GB", "0"])
def test_a_worker_whose_model_folder_holds_other_weights_is_refused(tiny_run, tmp_path, monkeypatch, size):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", size)
    folder = shutil.copytree(tiny_run["model"]["name"], tmp_path / "model")
    config, kept = configured(tiny_run, model={"name": str(folder)}), frozenset({"square"})
    loaded, splits = load_parts(config)
    calibration, search = splits.calibration.windows, splits.search.windows
    prepared = prepare_model(config, loaded, calibration, keep=kept)
    maker = EvaluatorMaker(config, calibration, search, (), kept, prepared.store, prepared.key)
    asked = [Request(prepared.prunable.dense_units, (0,))]
    assert maker().measure(asked)[0].loss == maker.on(prepared).measure(asked)[0].loss
    if prepared.store is not None:  # another run has needed its room since
        shutil.rmtree(prepared.store)
        assert maker().measure(asked)[0].loss == maker.on(prepared).measure(asked)[0].loss
        assert prepared.store.is_dir()
    tiny_model("llama", seed=1).save_pretrained(folder)
    with pytest.raises(WorkerError, match="is not the one that this run has prepared"):
        maker()


CRITERION = """
import ffgym

class Acme(ffgym.Criterion):
    '''Weights alone.'''

    name = "acme"

    def score(self, weight, stats):
        return weight.abs().sum(dim=0)

@ffgym.hookimpl
def ffgym_criteria():
    return [Acme]
"""


@pytest.mark.parametrize(
    ("source", "model", "criterion", "lacking"),
    [
        (CRITERION, "llama", "acme", "criterion 'acme'"),
        (FAMILY.format(name="starcoder2"), "starcoder2", "wanda", "family 'starcoder2'"),
    ],
    ids=["criterion", "family"],
)
def test_a_plugin_that_a_workers_machine_lacks_is_named_with_its_package(
    tiny_run, tmp_path, install, monkeypatch, source, model, criterion, lacking
):
    class Cluster:
        def executor(self, make, dense, dense_units):
            return make

    install("acme-parts", source)
    folder = shutil.copytree(tiny_run["model"]["name"], tmp_path / "model")
    tiny_model(model).save_pretrained(folder)
    config = configured(tiny_run, model={"name": str(folder)}, criterion={"name": criterion})
    loaded, splits = load_parts(config)
    prepared = prepare_model(config, loaded, splits.calibration.windows)
    make = shared_executor(Cluster(), config, loaded, prepared, splits)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")  # as if this were another machine
    with pytest.raises(WorkerError, match=f"a worker on .* does not have {lacking}") as raised:
        make()
    assert raised.value.hint == "Install acme-parts 1.0 on all machines of the cluster."


@pytest.fixture(scope="module")
def parts(tiny_run):
    return load_parts(RunConfig.model_validate(tiny_run))


def test_parts_are_the_model_and_splits_that_do_not_touch(parts):
    loaded, splits = parts
    assert loaded.model.config.model_type == "llama"
    assert splits.calibration.windows.shape == (8, 32)
    assert splits.search.windows.shape == (8, 32)
    assert splits.report.windows.shape == (2, 32)
    rows = [tuple(row) for split in (splits.calibration, splits.search) for row in split.windows.tolist()]
    assert len(set(rows)) == 16


def test_the_environment_follows_the_configuration(tiny_run):
    env = make_pruning_env(
        configured(
            tiny_run,
            prune={"sparsity": 0.4, "resource": "macs", "context": 1, "calibration": "none", "min_units": 10},
            search={"episode_tokens": 100, "final_tokens": 64},
        )
    )
    assert (env.sparsity, env.budget.resource, env.calibrated) == (0.4, "macs", False)
    assert env.episode_windows == 4, "whole windows, rounded up"
    assert env.windows.shape == (8, 32)
    env.reset(seed=0)
    info = env.step(np.linspace(-1, 1, 6).astype(np.float32))[4]
    assert info["kept"][::2].tolist() == [2, 2, 2], "fewer than 10, so they stay whole"
    assert info["kept"][1] == 10
    assert info["sparsity"] >= 0.4


def test_the_environment_follows_a_file_and_the_tables_beside_it(tiny_run, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(configured(tiny_run, prune={"sparsity": 0.4, "align": 16})))
    env = make_pruning_env(str(file), prune={"sparsity": 0.3})
    assert env.sparsity == 0.3
    env.reset(seed=0)
    kept = env.step(np.zeros(6, np.float32))[4]["kept"]
    assert not (kept[1::2] % 16).any()
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        make_pruning_env(tmp_path / "missing.toml")


def test_the_next_environment_knows_what_the_dense_model_loses(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")

    def dense_loss(**tables):
        env = make_pruning_env(configured(tiny_run, **tables))
        env.reset(options={"subset": (0, 3)})
        return env.step(np.zeros(6, np.float32))[4]["dense_loss"]

    first = dense_loss()
    (file,) = tmp_path.glob("prepared/llama-*/dense-losses.jsonl")
    known = file.read_text()
    assert len(known.splitlines()) == 2
    assert dense_loss(prune={"sparsity": 0.4}) == first
    assert file.read_text() == known, "the store is whole, and nothing was measured again"


def test_one_shape_for_all_layers(tiny_run):
    env = make_pruning_env(configured(tiny_run, prune={"uniform": True, "sparsity": 0.4}))
    assert env.action_space.shape == (6,), "the action is still one importance a sublayer"
    env.reset(seed=0)
    info = env.step(np.linspace(-1, 1, 6).astype(np.float32))[4]
    assert len({tuple(layer) for layer in info["kept"].reshape(3, 2)}) == 1
    assert info["sparsity"] >= 0.4


def test_one_shape_is_one_that_the_family_takes():
    """Four heads of which Llama may keep 1, 2 or 4."""
    model = tiny_model("llama", grouped_query=False)
    config = RunConfig.model_validate({"prune": {"uniform": True, "resource": "kv", "sparsity": 0.2}})
    assert [shape.kept[:2] for shape in make_budget(config, model).shapes(0.2)] == [(2, 48)]
    any_heads = tiny_model("mistral", grouped_query=False)
    assert [shape.kept[:2] for shape in make_budget(config, any_heads).shapes(0.2)] == [(3, 48)]


def test_what_a_stock_checkpoint_cannot_say_is_refused_before_anything_is_prepared(install):
    config = RunConfig.model_validate({"prune": {"uniform": True, "calibration": "affine"}})
    with pytest.raises(ModelError, match="stock mistral checkpoint has no bias"):
        make_budget(config, tiny_model("mistral"))
    make_budget(config, tiny_model("llama"))
    install("acme-family", FAMILY.format(name="starcoder2").replace("    stock = ffgym.Stock()\n", ""))
    config = RunConfig.model_validate({"prune": {"uniform": True}})
    with pytest.raises(ModelError, match="stock starcoder2 checkpoint can have is not known"):
        make_budget(config, tiny_model("starcoder2"))
    config = RunConfig.model_validate({"prune": {"uniform": True, "resource": "kv"}})
    with pytest.raises(BudgetError, match=r"reachable range is 0 to 0\.0000"):
        make_budget(config, tiny_model("opt"))


def test_a_key_beside_plain_tables_wins_and_leaves_the_others(tiny_run, tmp_path):
    tables = {**tiny_run, "prune": {"sparsity": 0.3, "resource": "kv", "align": 16}}
    file = tmp_path / "run.toml"
    file.write_text(to_toml(RunConfig.model_validate(tables)))
    for config in (tables, file, configured(tables)):
        env = make_pruning_env(config, prune={"sparsity": 0.1, "resource": None})
        assert (env.sparsity, env.budget.resource) == (0.1, "kv")


@pytest.mark.parametrize(("ridge", "allowed"), [("auto", set(RIDGE_GRID)), (0.7, {0.7})])
def test_ridge_auto_or_fixed(tiny_run, ridge, allowed):
    config = configured(tiny_run, prune={"ridge": ridge})
    loaded, splits = load_parts(config)
    assert set(prepare_model(config, loaded, splits.calibration.windows).ridges) <= allowed


def test_the_budget_counts_bytes_of_the_models_dtype(tiny_run, parts):
    budget = make_budget(configured(tiny_run, prune={"resource": "kv"}), parts[0].model)
    assert budget.dense_cost == 3 * 2 * 2 * 8 * 4
    assert budget.project(np.zeros(6), 0.2).resource == "kv"


def test_an_environment_may_be_made_and_used_in_inference_mode(tiny_run):
    with torch.inference_mode():
        env = make_pruning_env(tiny_run, criterion={"name": "taylor"})
        env.reset(seed=3, options={"slopes": True})
        assert env.step(np.zeros(6, np.float32))[4]["slopes"].any()


def test_the_callers_autocast_changes_no_bit_of_an_environment_or_of_its_store(tiny_run, tmp_path, monkeypatch):
    def measured(env):
        env.reset(seed=3)
        info = env.step(np.linspace(-1, 1, 6).astype(np.float32))[4]
        return info["loss"], info["dense_loss"]

    expected = measured(make_pruning_env(tiny_run))
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        env = make_pruning_env(tiny_run)
        assert measured(env) == expected
        assert torch.is_autocast_enabled("cpu")
    assert measured(make_pruning_env(tiny_run)) == expected


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny_run, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**6, 10**6))
    with pytest.raises(FitError, match=r"does not fit: .* needs .* of memory, most of it for libraries"):
        make_pruning_env(RunConfig.model_validate(tiny_run))
