"""The models that tests are made with: what they promise, and that the trained one was converted right."""

from __future__ import annotations

import math

import pytest
import torch
from glass_model import glass_model

from ffgym.models.families import family_of_type
from ffgym.testing.models import EXPERT_FAMILIES, TINY_FAMILIES, tiny_model

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures in it. "
    "She was walking by the side of the river, and thought that there was nothing so very remarkable in that."
)


@pytest.fixture(scope="module")
def glass():
    return glass_model()


@pytest.mark.parametrize("family", TINY_FAMILIES + EXPERT_FAMILIES)
def test_the_same_arguments_give_the_same_model_and_another_seed_another(family):
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        first, again, other = (tiny_model(family, seed=seed)(ids).logits for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_logits_differ_clearly_and_nothing_is_an_identity(family):
    model = tiny_model(family)
    with torch.no_grad():
        logits = model(torch.arange(3, 19).unsqueeze(0)).logits
    assert logits.std() > 0.5
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name
    assert not model.training


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("grouped", [True, False])
def test_heads_layers_and_dtype_are_as_asked(family, grouped):
    model = tiny_model(family, grouped_query=grouped, layers=5, dtype=torch.bfloat16)
    own = family_of_type(family)
    rows = sum(producer.out_features for producer in own.producers(own.layers(model)[0], "attention"))
    assert rows == 32 + 2 * (16 if grouped and own.kv_heads else 32)
    assert len(own.layers(model)) == 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_trained_model_knows_english(glass):
    """Which it would not if its weights had been converted wrongly."""
    model, tokenizer = glass
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :128]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        without_order = model(shuffled, labels=shuffled).loss.item()
    assert loss < 4.2 < math.log(1024) < without_order
    assert model.num_parameters() == 852_608


def test_its_tokenizer_gives_the_text_back_and_adds_nothing(glass):
    tokenizer = glass[1]
    text = "Alice  said:\n\n“Oh dear!” — so she did."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < 1024
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer("∑").input_ids == [tokenizer.unk_token_id]
