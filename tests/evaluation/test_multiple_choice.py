"""Answers that share a row are scored as if each stood in a row of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from made_up_examples import made_up_examples
from measured_alone import answered_right, log_likelihoods

from ffgym.data.examples import EncodedExample
from ffgym.errors import ModelError
from ffgym.evaluation.multiple_choice import task_accuracy
from ffgym.models.cut import PrunableModel
from ffgym.testing.models import tiny_model


@torch.no_grad()
def plain(model, example):
    """One row per answer, full logits, float64."""
    sums = []
    for answer in example.answers:
        ids = torch.tensor([*example.context, *answer])
        logs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(1)
        sums.append(float(sum(logs[i - 1, ids[i]] for i in range(len(example.context), len(ids)))))
    return sums


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_row_for_every_answer(family, attention):
    model, examples = tiny_model(family), made_up_examples(9)
    model.set_attn_implementation(attention)
    got = log_likelihoods(model, examples)
    for example, likelihoods in zip(examples, got, strict=True):
        assert likelihoods == pytest.approx(plain(model, example), rel=1e-5, abs=1e-5)


def test_scores_of_a_model_with_cut_layers_are_the_plain_ones():
    prunable, examples = PrunableModel(tiny_model("llama")), made_up_examples(9)
    prunable.cut((1, 20, 0, 48, 2, 0))
    for example, likelihoods in zip(examples, log_likelihoods(prunable.model, examples), strict=True):
        assert likelihoods == pytest.approx(plain(prunable.model, example), rel=1e-5, abs=1e-5)


def test_examples_longer_than_a_sliding_window_are_refused():
    model = tiny_model("mistral")
    model.config.sliding_window = 6
    assert log_likelihoods(model, [EncodedExample("a", (5, 6, 7), ((8, 9), (9, 8, 7)), 0)])
    with pytest.raises(ModelError, match="an example of 7 tokens is longer than the model's sliding window of 6"):
        log_likelihoods(model, [EncodedExample("a", (5, 6, 7, 8), ((8, 9), (9, 8, 7)), 0)])


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_batches_keep_the_order_of_the_examples(tokens_per_batch):
    model, examples = tiny_model("qwen2"), made_up_examples(12)
    best = [int(np.argmax(plain(model, example))) for example in examples]
    got = answered_right(model, examples, tokens_per_batch=tokens_per_batch)
    assert got == [b == e.right for b, e in zip(best, examples, strict=True)]
    assert 0 < sum(got) < 12, "some are right and some are wrong, or the test says nothing"


def test_a_batch_holds_no_more_tokens_than_allowed():
    model, examples, shapes = tiny_model("llama"), made_up_examples(20), []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answered_right(model, examples, tokens_per_batch=100)
    assert len(shapes) > 1
    assert max(shapes) <= 100
    assert sum(shapes) < 1.3 * sum(example.tokens for example in examples), "rows of a batch are about equally long"


def test_the_first_of_equally_likely_answers_counts():
    twice = EncodedExample("a", (5, 6), ((7, 8), (7, 8)), 1)
    assert answered_right(tiny_model("llama"), [twice]) == [False]


def test_nothing_is_right_where_likelihoods_are_no_numbers():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    assert not any(answered_right(model, made_up_examples(9)))


def test_accuracy_is_the_mean_over_tasks():
    examples = [*made_up_examples(1, task="a"), *made_up_examples(3, task="b")]
    assert task_accuracy(examples, [True, True, False, False]) == pytest.approx((1 + 1 / 3) / 2)
