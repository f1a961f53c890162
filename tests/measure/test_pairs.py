"""What a saved model keeps of the dense one, and that strangers are told apart."""

from __future__ import annotations

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.errors import ModelError
from ffgym.export.checkpoint import save_pruned
from ffgym.measure.pairs import units_kept
from ffgym.models.cut import PrunableModel
from ffgym.testing.models import tiny_model


def saved_and_loaded(family, kept, folder):
    from transformers import AutoModelForCausalLM

    prunable = PrunableModel(tiny_model(family))
    prunable.cut(kept)
    save_pruned(prunable, None, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
@pytest.mark.parametrize("kept", [(1, 20, 2, 30, 1, 9), (2, 48, 0, 0, 2, 1), (2, 48, 2, 48, 2, 48)])
def test_a_saved_model_says_what_it_keeps(family, kept, tmp_path):
    assert units_kept(saved_and_loaded(family, kept, tmp_path / "m"), tiny_model(family)) == kept


def test_a_dense_model_keeps_everything():
    assert units_kept(tiny_model("llama"), tiny_model("llama")) == (2, 48) * 3


def with_sizes(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    base |= {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**(base | sizes)))


def test_a_stock_model_with_smaller_sublayers_will_do():
    pruned = with_sizes(num_attention_heads=2, num_key_value_heads=1, intermediate_size=40)
    assert units_kept(pruned, tiny_model("llama")) == (1, 40) * 3


@pytest.mark.parametrize(
    ("pruned", "complaint"),
    [
        (lambda: tiny_model("qwen2"), "pruned model is of family 'qwen2', the dense one of 'llama'"),
        (lambda: tiny_model("llama", layers=2), "the pruned model has 2 decoder layers, the dense one 3"),
        (lambda: with_sizes(hidden_size=64), "the pruned model has 64 hidden channels, the dense one 32"),
        (lambda: with_sizes(vocab_size=64), "the pruned model has 64 tokens in the vocabulary, the dense one 128"),
        (lambda: with_sizes(head_dim=16), "the pruned model has 16 channels of a head, the dense one 8"),
        (lambda: with_sizes(intermediate_size=49), "layer 0 mlp of the pruned model is no part of"),
        (lambda: with_sizes(num_key_value_heads=4), "layer 0 attention of the pruned model is no part of"),
        (lambda: with_sizes(num_attention_heads=1, num_key_value_heads=1), "layer 0 attention .* is no part of"),
    ],
)
def test_models_that_do_not_belong_together(pruned, complaint):
    with pytest.raises(ModelError, match=complaint) as raised:
        units_kept(pruned(), tiny_model("llama"))
    assert "--dense" in raised.value.hint


def test_an_architecture_that_is_not_known():
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ModelError, match=r"'gpt2'.* is not supported"):
        units_kept(tiny, tiny_model("llama"))


def test_a_dense_model_that_is_pruned_itself(tmp_path):
    pruned = saved_and_loaded("llama", (1, 20) * 3, tmp_path / "m")
    with pytest.raises(ModelError, match="already pruned by ffgym"):
        units_kept(pruned, pruned)
