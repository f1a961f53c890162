"""What the models that tests are made with promise."""

from __future__ import annotations

import pytest
import torch

from ffgym.models.families import family_of_type
from ffgym.testing.models import EXPERT_FAMILIES, TINY_FAMILIES, tiny_model

FEW = ("llama", "opt", "phi3", "gemma2")  # of one function, which makes all families alike


@pytest.mark.parametrize("family", [*FEW, EXPERT_FAMILIES[0]])
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


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("grouped", [True, False])
def test_heads_layers_and_dtype_are_as_asked(family, grouped):
    model = tiny_model(family, grouped_query=grouped, layers=5, dtype=torch.bfloat16)
    own = family_of_type(family)
    rows = sum(producer.out_features for producer in own.producers(own.layers(model)[0], "attention"))
    assert rows == 32 + 2 * (16 if grouped and own.kv_heads else 32)
    assert len(own.layers(model)) == 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
