"""Chunked divergences are those of the full distributions, and the dense model's logits are never kept."""

from __future__ import annotations

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from measured_alone import compared, final_hidden
from transformers import LlamaConfig, LlamaForCausalLM

from ffgym.evaluation.divergence import BUFFERS, LOGIT_BYTES
from ffgym.testing.models import tiny_model

BOTH = frozenset({"kl", "reverse_kl"})


def disturbed(model):
    """The same output head on other layers: what pruning leaves of a model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter.mul_(0.8)
    return model


@torch.no_grad()
def plain(dense, pruned, windows):
    """One window at a time, full distributions, float64: (losses, forward, reverse)."""
    rows = []
    for window in windows:
        p, q = (
            m(input_ids=window[None], use_cache=False).logits[0, :-1].double().log_softmax(1) for m in (dense, pruned)
        )
        forward, reverse = (p.exp() * (p - q)).sum(1).mean(), (q.exp() * (q - p)).sum(1).mean()
        rows.append((float(-q.gather(1, window[1:, None]).mean()), float(forward), float(reverse)))
    return [list(column) for column in zip(*rows, strict=True)]


def measured(dense, pruned, windows, needs=BOTH, **options):
    hidden = [final_hidden(dense, window[None]) for window in windows]
    return compared(pruned, windows, hidden, needs, **options)


def agrees(dense, pruned, windows, **options):
    """What is measured is what full distributions give."""
    losses, forward, reverse = plain(dense, pruned, windows)
    got = measured(dense, pruned, windows, **options)
    assert got.losses == pytest.approx(losses, rel=1e-5)
    assert got.kls == pytest.approx(forward, rel=1e-4)
    assert got.reverse_kls == pytest.approx(reverse, rel=1e-4)
    return got


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_equals_the_full_distributions(family, random_windows):
    got = agrees(tiny_model(family), disturbed(tiny_model(family)), random_windows(5, 20))
    assert got.kl == pytest.approx(sum(got.kls) / 5)
    assert got.reverse_kl == pytest.approx(sum(got.reverse_kls) / 5)
    apart = max(abs(a - b) for a, b in zip(got.kls, got.reverse_kls, strict=True))
    assert apart > 1e-3, "the directions can be told apart"
    assert got.tokens_per_window == 19


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_batches_do_not_matter(tokens_per_batch, random_windows):
    dense, pruned = tiny_model("llama"), disturbed(tiny_model("llama"))
    agrees(dense, pruned, random_windows(5, 20), tokens_per_batch=tokens_per_batch)


def test_a_vocabulary_too_large_for_all_logits_at_once_is_no_other():
    models = []
    for disturb in (False, True):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=150_000, initializer_range=0.5, **sizes)).eval()
        models.append(disturbed(model) if disturb else model)
    windows = torch.randint(150_000, (2, 40))
    assert 4 * BUFFERS * 150_000 * 2 * 39 > LOGIT_BYTES
    agrees(*models, windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_does_not_differ_from_itself(dtype, random_windows):
    model, windows = tiny_model("llama", dtype=dtype), random_windows(4, 20)
    got = measured(model, model, windows, tokens_per_batch=20)
    assert got.kls == got.reverse_kls == (0.0,) * 4


def test_only_the_direction_that_is_asked_for_is_there(random_windows):
    model, windows = tiny_model("llama"), random_windows(2, 20)
    forward, reverse = (measured(model, model, windows, frozenset({name})) for name in ("kl", "reverse_kl"))
    assert (forward.kls is None, forward.reverse_kls is None) == (False, True)
    assert (reverse.kls is None, reverse.reverse_kls is None) == (True, False)
    with pytest.raises(AssertionError, match="reverse_kl is None"):
        _ = forward.reverse_kl


def test_a_soft_cap_and_a_head_bias_count(random_windows):
    models = []
    for disturb in (False, True):
        model = tiny_model("llama")
        model.config.final_logit_softcapping = 2.0
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 128))
        models.append(disturbed(model) if disturb else model)
    windows = random_windows(3, 20)
    got = measured(*models, windows)
    with torch.no_grad():
        for index, window in enumerate(windows):
            p, q = (
                (2 * torch.tanh(m(input_ids=window[None], use_cache=False).logits[0, :-1].double() / 2)).log_softmax(1)
                for m in models
            )
            assert got.kls[index] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


def test_a_model_that_breaks_down_is_not_finite(random_windows):
    dense, broken, windows = tiny_model("llama"), tiny_model("llama"), random_windows(2, 20)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    got = measured(dense, broken, windows)
    assert not got.finite
    assert measured(dense, dense, windows).finite
