"""The loss summed up tile by tile is the plain cross-entropy of the full logits."""

from __future__ import annotations

import math

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from torch.nn.functional import cross_entropy
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaConfig, LlamaForCausalLM

from ffgym.errors import ModelError
from ffgym.evaluation.perplexity import TILE_COLUMNS, TILE_ROWS, check_logits, evaluate, token_losses
from ffgym.testing.models import tiny_model
from ffgym.types import Evaluation


@torch.no_grad()
def plain(model, windows):
    """One window at a time, full logits, float64."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
        losses.append(float(cross_entropy(logits, window[1:])))
    return losses


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_equals_the_plain_cross_entropy(family, random_windows):
    model, windows = tiny_model(family), random_windows(7, 20)
    got = evaluate(model, windows)
    assert got.losses == pytest.approx(plain(model, windows), rel=1e-5)
    assert got.tokens_per_window == 19
    assert len(got.losses) == 7
    assert got.loss == pytest.approx(sum(plain(model, windows)) / 7, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2", "phi", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_done_to_logits_is_known(family, dtype, random_windows):
    check_logits(tiny_model(family, dtype=dtype), random_windows(1, 16)[0])


def test_a_model_that_scales_its_logits_as_ffgym_does_not_is_refused(random_windows):
    """Before, `ffgym eval` gave it a wrong loss."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = HyperCLOVAXForCausalLM(HyperCLOVAXConfig(vocab_size=128, logits_scaling=2.0, **sizes)).eval()
    with pytest.raises(ModelError, match="a HyperCLOVAXForCausalLM changes the output of its head"):
        check_logits(model, random_windows(1, 16)[0])


@pytest.mark.parametrize("scale", [1, 10_000])  # highest logits in different tiles, far apart
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_text_and_vocabularies_of_several_tiles_make_one_distribution(scale, dtype, error):
    """Also of positions and tokens that leave the last tile narrower."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2 * TILE_COLUMNS + 100, **sizes)).eval().to(dtype)
    windows = torch.randint(model.config.vocab_size, (3, TILE_ROWS // 3 + 100))
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    assert evaluate(model, windows, tokens_per_batch=windows.numel()).losses == pytest.approx(
        plain(model, windows), rel=error
    )


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 60, 10_000])
def test_batches_do_not_matter_and_are_reported(tokens_per_batch, random_windows):
    model, windows = tiny_model("opt"), random_windows(5, 20)
    seen = []
    got = evaluate(
        model, windows, tokens_per_batch=tokens_per_batch, on_progress=lambda done, total: seen.append((done, total))
    )
    assert got.losses == pytest.approx(plain(model, windows), rel=1e-5)
    assert seen[-1] == (5, 5)
    assert seen[0] == (max(1, min(5, tokens_per_batch // 20)), 5)


def test_two_tokens_are_the_shortest_window(random_windows):
    model, windows = tiny_model("llama"), random_windows(3, 2)
    assert evaluate(model, windows).losses == pytest.approx(plain(model, windows), rel=1e-5)


def test_a_soft_cap_and_a_head_bias_count(random_windows):
    model = tiny_model("llama")
    hidden = torch.randn(9, 32)
    targets = random_windows(1, 9)[0]
    head = model.lm_head
    head.bias = torch.nn.Parameter(torch.randn(128))
    model.config.final_logit_softcapping = 2.0
    with torch.inference_mode():
        got = token_losses(model, hidden, targets)
        logits = 2.0 * torch.tanh((hidden @ head.weight.T + head.bias) / 2.0)
    torch.testing.assert_close(got, cross_entropy(logits, targets, reduction="none"))
    assert got.max() < math.log(128) + 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_broken_weights_give_a_loss_that_is_not_finite(bad, where, random_windows):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(where)[5] = bad
    got = evaluate(model, random_windows(3, 10))
    assert not math.isfinite(got.loss)
    assert not math.isfinite(got.perplexity)


def test_one_broken_window_does_not_touch_the_others(random_windows):
    model, windows = tiny_model("llama"), random_windows(3, 10)
    windows[windows == 7] = 8
    wanted = evaluate(model, windows)
    windows[1, 0] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    got = evaluate(model, windows)
    assert math.isnan(got.losses[1])
    assert (got.losses[0], got.losses[2]) == pytest.approx((wanted.losses[0], wanted.losses[2]))


def test_perplexity_of_a_broken_model_is_infinite_not_an_error():
    assert Evaluation((800.0,), 5).perplexity == math.inf
    assert math.isnan(Evaluation((math.nan,), 5).perplexity)
