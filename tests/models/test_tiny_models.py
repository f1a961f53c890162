"""The models that tests are made with: what they promise, and that the trained one was converted right."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ffgym.data.assets import GLASSLLM, fetch
from ffgym.errors import UnknownNameError
from ffgym.models.families import family_of, family_of_type
from ffgym.testing.models import TINY_FAMILIES, glass_model, tiny_model

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures in it. "
    "She was walking by the side of the river, and thought that there was nothing so very remarkable in that."
)


@pytest.fixture(scope="module")
def glass():
    return glass_model()


@pytest.mark.parametrize("family", TINY_FAMILIES)
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


def test_families_have_the_biases_they_are_known_for():
    def biased(family):
        return {name.split(".")[-2] for name, _ in tiny_model(family).named_parameters() if name.endswith(".bias")}

    assert biased("qwen2") == {"q_proj", "k_proj", "v_proj"}
    assert {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"} < biased("opt")
    assert biased("llama") == biased("mistral") == biased("qwen3") == biased("gemma") == set()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("grouped", [True, False])
def test_grouped_or_multi_head(family, grouped):
    model, own = tiny_model(family, grouped_query=grouped), family_of_type(family)
    rows = sum(producer.out_features for producer in own.producers(own.layers(model)[0], "attention"))
    assert rows == 32 + 2 * (16 if grouped and own.kv_heads else 32)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_layers_and_dtype_are_as_asked(family):
    model = tiny_model(family, layers=5, dtype=torch.bfloat16)
    assert len(family_of(model).layers(model)) == 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_unknown_family_is_answered_with_the_list():
    with pytest.raises(UnknownNameError, match="'lama'") as raised:
        tiny_model("lama")
    assert "llama" in raised.value.hint
    assert "opt" in raised.value.hint


def glass_logits(ids):
    """glassllm's forward pass in its own conventions: ``x @ W``, rotary pairs side by side."""
    with np.load(fetch(GLASSLLM) / "en.npz", allow_pickle=False) as file:
        sizes = json.loads(str(file["__config__"]))
        w = {name: file[name].astype(np.float64) for name in file.files if name != "__config__"}
    heads, groups = sizes["n_heads"], sizes["n_kv_heads"]
    dim, length = sizes["d_model"] // heads, len(ids)
    angles = np.outer(np.arange(length), sizes["rope_base"] ** (-2.0 * np.arange(dim // 2) / dim))

    def norm(x, gamma):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + sizes["eps"]) * gamma

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
        return np.stack(turned, -1).reshape(x.shape)

    def split(x, count):
        return x.reshape(length, count, dim).transpose(1, 0, 2)

    x = w["E"][ids]
    for layer in range(sizes["n_layers"]):
        b = f"blocks.{layer}"
        h = norm(x, w[f"{b}.norm1.gamma"])
        q = rotate(split(h @ w[f"{b}.attn.W_Q"], heads))
        k = rotate(split(h @ w[f"{b}.attn.W_K"], groups)).repeat(heads // groups, 0)
        v = split(h @ w[f"{b}.attn.W_V"], groups).repeat(heads // groups, 0)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(dim)
        scores[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + (attention @ v).transpose(1, 0, 2).reshape(length, -1) @ w[f"{b}.attn.W_O"]
        h = norm(x, w[f"{b}.norm2.gamma"])
        gate = h @ w[f"{b}.ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{b}.ffn.W3"])) @ w[f"{b}.ffn.W2"]
    return norm(x, w["norm_f.gamma"]) @ w["E"].T


def test_the_converted_model_computes_what_glassllm_computes(glass):
    model, tokenizer = glass
    ids = tokenizer(TEXT).input_ids[:100]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    np.testing.assert_allclose(logits, glass_logits(ids), atol=2e-4)


def test_the_trained_model_knows_english(glass):
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
