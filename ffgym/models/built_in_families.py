"""The families that ship with ffgym. One more is a class here and a line in ``ffgym/plugins/built_ins.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ffgym.models.families import Family, Stock
from ffgym.types import Sublayer

WINDOWS_IN_SOME_LAYERS: Mapping[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
"""Of a tiny model."""


class Llama(Family):
    """Multi-head or grouped-query attention, gated MLP."""

    name = "llama"
    stock = Stock("divides hidden size", attention_bias="attention_bias", mlp_bias="mlp_bias")
    gguf = ("llama", "deci")


class Mistral(Family):
    """As Llama."""

    name = "mistral"
    stock = Stock()
    gguf = ("llama", "deci")


class Qwen2(Family):
    """As Llama, with biases of query, key and value."""

    name = "qwen2"
    stock = Stock()
    gguf = ("qwen2", "deci")


class Qwen3(Family):
    """As Llama, with norms of queries and keys."""

    name = "qwen3"
    stock = Stock(attention_bias="attention_bias")
    gguf = ("qwen3", "openelm")


class Gemma(Family):
    """As Llama, with another activation; not Gemma 2 or 3, which scale and norm otherwise."""

    name = "gemma"
    stock = Stock(attention_bias="attention_bias")
    gguf = ("gemma",)


class Gemma2(Family):
    """As Gemma, with norms behind each half, soft-capped attention scores and logits, and sliding windows."""

    name = "gemma2"
    gguf = ("gemma2",)
    stock = Stock("divides hidden size", attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {"sliding_window": 8, "query_pre_attn_scalar": 8}


class Gemma3(Family):
    """As Gemma 2, with norms of queries and keys instead of soft caps; the text model."""

    name = "gemma3_text"
    gguf = ("gemma3",)
    stock = Stock("divides hidden size", attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {**WINDOWS_IN_SOME_LAYERS, "query_pre_attn_scalar": 8}


class SmolLM3(Family):
    """As Llama; some layers have no rotary positions."""

    name = "smollm3"
    stock = Stock(attention_bias="attention_bias", mlp_bias="mlp_bias")
    tiny: ClassVar[Mapping[str, Any]] = {"no_rope_layer_interval": 2}


class OLMo(Family):
    """As Llama, with norms that have no weights; queries, keys and values may be clipped."""

    name = "olmo"
    stock = Stock(attention_bias="attention_bias")


class OLMo2(Family):
    """As Llama, with norms behind each half, and of the queries and keys of all heads together."""

    name = "olmo2"
    whole_attention = True
    stock = Stock(attention_bias="attention_bias")


class OLMo3(OLMo2):
    """As OLMo 2, with sliding windows."""

    name = "olmo3"
    tiny: ClassVar[Mapping[str, Any]] = {"sliding_window": 8}


class Granite(Family):
    """As Llama; embeddings, attention scores, what each half adds and logits are scaled."""

    name = "granite"
    stock = Stock(attention_bias="attention_bias", mlp_bias="mlp_bias")
    tiny: ClassVar[Mapping[str, Any]] = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    }


class Cohere2(Family):
    """Command R7B and A: attention and MLP read the same input; sliding windows, scaled logits."""

    name = "cohere2"
    stock = Stock(attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {**WINDOWS_IN_SOME_LAYERS, "logit_scale": 0.5}


class Exaone4(Family):
    """As Qwen3, with norms behind each half in place of those before it, and sliding windows."""

    name = "exaone4"
    stock = Stock()
    tiny: ClassVar[Mapping[str, Any]] = {"sliding_window": 8}


class Ernie45(Family):
    """As Llama; the dense models."""

    name = "ernie4_5"
    stock = Stock()


class SeedOss(Family):
    """As Qwen2."""

    name = "seed_oss"
    stock = Stock()
    tiny: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0}


class Mixtral(Family):
    """As Mistral, with a mixture of experts in place of every MLP."""

    name = "mixtral"
    experts, router, expert_count = "mlp.experts", "mlp.gate", "num_local_experts"
    stock = Stock()
    tiny: ClassVar[Mapping[str, Any]] = {"num_local_experts": 6, "num_experts_per_tok": 2}


class Qwen3MoE(Family):
    """As Qwen3, with a mixture of experts in place of most MLPs."""

    name = "qwen3_moe"
    experts, router, expert_count = "mlp.experts", "mlp.gate", "num_local_experts"
    stock = Stock(attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }


class OLMoE(Family):
    """As OLMo 2 in its attention, with norms before each half and a mixture of experts in place of every MLP."""

    name = "olmoe"
    whole_attention = True
    experts, router, expert_count = "mlp.experts", "mlp.gate", "num_experts"
    stock = Stock(attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {"num_experts": 6, "num_experts_per_tok": 2}


class GptOss(Family):
    """Attention with biases and a sink for every head, kept whole or not at all; experts and routers with biases."""

    name = "gpt_oss"
    whole_attention = True
    experts, router, expert_count = "mlp.experts", "mlp.router", "num_local_experts"
    stock = Stock(attention_bias="attention_bias")
    tiny: ClassVar[Mapping[str, Any]] = {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4,
        },
    }


class Phi3(Family):
    """As Llama, with one linear for query, key and value, and one for gate and up."""

    name = "phi3"
    query = key = value = "self_attn.qkv_proj"
    mlp_producers = ("mlp.gate_up_proj", "mlp.gate_up_proj")
    head_count_attributes = ("config.num_attention_heads",)
    stock = Stock()


class GLM(Family):
    """As Llama, with one linear for gate and up, and rotary positions in half of a head's channels."""

    name = "glm"
    mlp_producers = ("mlp.gate_up_proj", "mlp.gate_up_proj")
    stock = Stock()


class GLM4(GLM):
    """As GLM, with norms behind each half, too."""

    name = "glm4"


class Ministral(Family):
    """As Mistral; some layers have a sliding window."""

    name = "ministral"
    stock = Stock()
    tiny = WINDOWS_IN_SOME_LAYERS


class Ministral3(Family):
    """As Mistral; queries far into a text are scaled."""

    name = "ministral3"
    stock = Stock()


class OPT(Family):
    """Multi-head attention and an MLP of two linears, all with biases."""

    name = "opt"
    decoder = "model.decoder"
    attention_consumer = "self_attn.out_proj"
    mlp_producers = ("fc1",)
    mlp_consumer = "fc2"
    kv_heads = None
    intermediate = "ffn_dim"
    head_count_attributes = ("num_heads",)
    stock = Stock("dense")
    tiny: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}


class Phi(Family):
    """Phi-1 and 2: attention and an MLP of two linears read the same input, and all have biases."""

    name = "phi"
    attention_consumer = "self_attn.dense"
    mlp_producers = ("mlp.fc1",)
    mlp_consumer = "mlp.fc2"
    stock = Stock()


class Nemotron(Family):
    """As Llama, with an MLP of two linears; not Llama-Nemotron, which is of family ``llama``, or Nemotron-H."""

    name = "nemotron"
    mlp_producers = ("mlp.up_proj",)
    stock = Stock(attention_bias="attention_bias", mlp_bias="mlp_bias")


class GPTNeoX(Family):
    """Pythia: multi-head attention and an MLP of two linears, with biases; most models let both read the same input."""

    name = "gpt_neox"
    decoder = "gpt_neox"
    query = key = value = "attention.query_key_value"
    attention_consumer = "attention.dense"
    mlp_producers = ("mlp.dense_h_to_4h",)
    mlp_consumer = "mlp.dense_4h_to_h"
    kv_heads = None
    stock = Stock("dense")

    def rows_per_unit(self, sublayer: Sublayer) -> list[tuple[int, ...]]:
        """Head after head, the fused linear has the queries, keys and values of one."""
        rows = super().rows_per_unit(sublayer)
        return [(sum(rows[0]),)] if sublayer.kind == "attention" else rows
