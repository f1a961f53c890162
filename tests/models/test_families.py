"""Every family's parts are found, and what a unit is made of agrees with numbers counted by hand."""

from __future__ import annotations

import re

import pytest
from torch import nn

from ffgym.errors import ModelError
from ffgym.models.built_in_families import Llama
from ffgym.models.families import family_of, family_of_type
from ffgym.plugins.architectures import check_architecture
from ffgym.plugins.built_ins import BUILTINS
from ffgym.testing.conformance import FamilyConformance
from ffgym.testing.models import TINY_FAMILIES, tiny_model


class TestContract(FamilyConformance):
    @pytest.fixture(params=BUILTINS["family"], autouse=True)
    def _choose(self, request):
        self.family = request.param


# hidden 32, 4 query heads of 8, 2 KV groups, 48 intermediate channels
GROUPED = 32 * (16 + 8 + 8) + 32 * 16  # q, k, v rows of one KV group and its 16 consumer columns
PLAIN = 32 * (8 + 8 + 8) + 32 * 8


@pytest.mark.parametrize(
    ("family", "grouped", "attention_bias", "mlp", "mlp_bias"),
    [
        ("llama", True, 0, 3 * 32, 0),
        ("llama", False, 0, 3 * 32, 0),
        ("mistral", True, 0, 3 * 32, 0),
        ("qwen2", True, 16 + 8 + 8, 3 * 32, 0),
        ("qwen2", False, 8 + 8 + 8, 3 * 32, 0),
        ("qwen3", True, 0, 3 * 32, 0),
        ("gemma", True, 0, 3 * 32, 0),
        ("opt", False, 8 + 8 + 8, 2 * 32, 1),
    ],
)
def test_units_counted_by_hand(family, grouped, attention_bias, mlp, mlp_bias):
    model = tiny_model(family, grouped_query=grouped)
    sublayers = family_of(model).sublayers(model)
    assert [(s.layer, s.kind) for s in sublayers] == [(i, kind) for i in range(3) for kind in ("attention", "mlp")]
    macs = GROUPED if grouped else PLAIN
    for attention, half in zip(sublayers[::2], sublayers[1::2], strict=True):
        assert (attention.units, attention.channels_per_unit) == ((2, 16) if grouped else (4, 8))
        assert (attention.unit_params, attention.unit_macs) == (macs + attention_bias, macs)
        assert (attention.query_heads_per_unit, attention.head_dim) == (2 if grouped else 1, 8)
        assert (half.units, half.channels_per_unit) == (48, 1)
        assert (half.unit_params, half.unit_macs) == (mlp + mlp_bias, mlp)
        assert (half.query_heads_per_unit, half.head_dim) == (0, 0)
        assert attention.depth == half.depth == 3
        assert (attention.channels, half.channels) == (32, 48)


def test_an_unsupported_architecture_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="'gpt2' is not supported") as raised:
        family_of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)))
    assert all(name in raised.value.hint for name in TINY_FAMILIES)


def test_an_unsupported_architecture_is_answered_with_the_nearest():
    with pytest.raises(ModelError, match="'ffgym_gemma4' is not supported") as raised:
        family_of_type("ffgym_gemma4")
    assert "Did you mean 'gemma'?" in raised.value.hint
    assert "docs/models.md#adding-a-family" in raised.value.hint


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            {"model_type": "glm4_moe", "n_routed_experts": 8},
            "'glm4_moe' has mixtures of experts of a kind",
            "adding-a-family.*ffgym eval",
        ),
        (
            {"model_type": "dbrx", "moe_num_experts": 8},
            "'dbrx' has mixtures of experts of a kind",
            "ffgym eval",
        ),
        ({"model_type": "mistrall"}, "'mistrall' is not supported", "Did you mean 'mistral'.*adding-a-family"),
        ({"model_type": "qwen2_5_vl_text"}, "is not supported", "Did you mean 'qwen2'"),
        ({"model_type": "qwen3_next", "num_experts": 8}, "has mixtures of experts", "Did you mean 'qwen3'"),
        ({"model_type": "llama4_text"}, "is not supported", "Did you mean 'llama'"),
        (
            {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
            "'qwen3_vl' is a checkpoint of several towers, .* 'qwen3_vl_text', is of no supported family",
            "Did you mean 'qwen3'",
        ),
    ],
)
def test_a_config_that_no_family_stands_for_is_refused_with_the_reason(config, message, hint):
    with pytest.raises(ModelError, match=message) as raised:
        check_architecture(config)
    assert re.search(hint, raised.value.hint)


@pytest.mark.parametrize(
    ("attribute", "value", "complaint"),
    [
        ("mlp_consumer", "mlp.out_proj", r"a LlamaDecoderLayer has no mlp\.out_proj, which family 'llama' says it has"),
        ("decoder", "transformer", r"a LlamaForCausalLM has no transformer\.layers"),
        ("heads", "n_head", "a LlamaConfig has no n_head"),
        ("kv_heads", "n_kv", "a LlamaConfig has no n_kv"),
        ("intermediate", "n_inner", "a LlamaConfig has no n_inner"),
        ("mlp_consumer", "mlp.up_proj", "layer 0 mlp: .*a producer with 48 outputs, .*reads 32 channels"),
    ],
)
def test_a_part_that_the_model_does_not_have_is_named(attribute, value, complaint):
    with pytest.raises(ModelError, match=complaint) as caught:
        type("Misspelt", (Llama,), {attribute: value})().sublayers(tiny_model("llama"))
    assert "print(model)" in caught.value.hint


class FP8Linear(nn.Linear):
    """Its weight times block scales is what it computes with."""


@pytest.mark.parametrize("other", [nn.Identity(), FP8Linear(48, 32, bias=False)])
def test_a_quantised_or_adapted_linear_is_refused(other):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = other
    with pytest.raises(ModelError, match=rf"mlp.down_proj is a {type(other).__name__}, not a plain linear layer"):
        family_of(model).sublayers(model)
