"""Both environment checkers accept the pruning environment without a warning, and what they say is passed on."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ffgym.envs
from ffgym.config import RunConfig
from ffgym.criteria.wanda import Wanda
from ffgym.envs.check import check_environment, complaints, small
from ffgym.envs.pruning_env import PruningEnv
from ffgym.models.preparation import prepare
from ffgym.pruning.budget import Budget
from ffgym.rewards.perplexity import Perplexity
from ffgym.testing.models import TINY_FAMILIES, tiny_model

WORDS = [f"w{i}" for i in range(120)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on a saved tiny model and corpora of random words."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "model")
    for name, seed in (("search.txt", 0), ("report.txt", 1)):
        words = np.random.default_rng(seed).choice(WORDS, 2000)
        (folder / name).write_text(" ".join(words), encoding="utf-8")
    search = str(folder / "search.txt")
    return {
        "model": {"name": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {
            "calibration": search,
            "search": search,
            "report": str(folder / "report.txt"),
            "window": 32,
            "calibration_tokens": 256,
            "search_tokens": 256,
            "report_tokens": 64,
        },
        "search": {"episode_tokens": 64, "final_tokens": 64},
    }


def tiny_env(family):
    prepared = prepare(tiny_model(family), Wanda(), torch.randint(3, 128, (8, 32)), ridge=0.01)
    windows = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))
    return PruningEnv(prepared.prunable, Perplexity(), windows, Budget(prepared.prunable.sublayers))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_both_checkers_pass_without_a_warning(family):
    assert complaints(tiny_env(family)) == []


def test_a_configured_run_is_checked(config):
    assert check_environment(RunConfig.model_validate(config)) == []


def test_it_is_checked_small_whatever_is_asked_for():
    checked = small(RunConfig())
    assert checked.data.window <= 128
    assert checked.data.calibration_tokens + checked.data.search_tokens <= 512
    assert checked.search.episode_tokens == checked.data.window
    assert checked.model == RunConfig().model
    assert checked.prune.model_copy(update={"ridge": "auto"}) == RunConfig().prune


def test_warnings_and_failures_become_complaints():
    class Odd(gymnasium.Env):
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)
        observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.full(2, 5, np.float32), 0.0, True, False, {}

    said = complaints(Odd())
    assert any(line.startswith("Gymnasium: ") for line in said)
    assert any(line.startswith("Stable-Baselines3: AssertionError") for line in said)
    assert not any("\x1b" in line for line in said)


def test_gymnasium_makes_the_environment_by_name(config):
    env = gymnasium.make(ffgym.envs.ENV_ID, config=config, prune={"sparsity": 0.3})
    observation, _ = env.reset(seed=0)
    np.testing.assert_allclose(observation, [0.3, 1.0])
    action = np.zeros(env.action_space.shape, np.float32)
    _, reward, terminated, truncated, info = env.step(action)
    assert isinstance(reward, float)
    assert (terminated, truncated) == (True, False)
    assert info["sparsity"] >= 0.3
    env.reset(seed=0)
    assert env.step(action)[1] == reward, "the same seed and action give the same bits"
    env.close()
