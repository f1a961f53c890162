"""Causal language models whose layers have different sizes, as pruned and saved by ffgym.

This file lies beside the weights and is all that loading them needs: it imports torch and transformers, takes the
stock model, and gives every layer the sizes that ``per_layer_config`` states. No stock ``forward`` is overridden.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class Skipped(nn.Module):
    """Stands for a sublayer with nothing left: zeros, or the bias that its consumer had.

    Args:
        bias: the consumer's bias, shape (hidden,), or ``None``.
        attention: whether it stands for attention (the decoder layer unpacks an output and attention weights) or for
            an MLP (an output alone).
    """

    def __init__(self, bias: torch.Tensor | None = None, *, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, bias.requires_grad))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Takes whatever the stock sublayer takes; the output has the shape and dtype of ``hidden_states``."""
        if self.bias is None:
            output = torch.zeros_like(hidden_states)
        else:
            output = self.bias.to(hidden_states.dtype).expand_as(hidden_states)
        return (output, None) if self.attention else output

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"attention={self.attention}, bias={self.bias is not None}"


class UnevenConfig:
    """What the configs below add to the stock ones.

    ``per_layer_config`` holds, for layers that differ from the config's own (dense) sizes, the number of heads and of
    intermediate channels; ``skip: ["attention"]`` or ``["mlp"]`` for sublayers with nothing left; and
    ``consumer_bias``, with the same two words, where the output projection has a bias that the stock architecture
    does not know.
    """

    def __post_init__(self, **kwargs):
        if self.head_dim is None:  # from the dense head count, while there is still one for all layers
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def kv_sharing_modes(self):
        """Tells transformers' caches that skipped attention stores nothing; ``None`` when none is skipped."""
        skipped = ["attention" in getattr(sizes, "skip", ()) for sizes in self.per_layer_config]
        return ["reuse" if s else None for s in skipped] if any(skipped) else None

    def validate(self):
        """Checks that the sizes of every layer fit together (the stock checks know one size for all layers)."""
        self.validate_token_ids()
        self.validate_layer_type()
        self.validate_output_attentions()
        for index, sizes in enumerate(self.per_layer_config):
            skip = getattr(sizes, "skip", ())
            if unknown := {*skip, *(sizes.consumer_bias or ())} - {"attention", "mlp"}:
                raise ValueError(f"layer {index}: unknown sublayer {sorted(unknown)}, only 'attention' and 'mlp'")
            if index == 0 and "attention" in skip:
                raise ValueError("layer 0: attention cannot be skipped, the length of the KV cache is read there")
            heads = sizes.num_attention_heads
            kv_heads = getattr(sizes, "num_key_value_heads", heads)
            if heads < 1 or kv_heads < 1 or heads % kv_heads:
                raise ValueError(f"layer {index}: {heads} query heads cannot share {kv_heads} key/value heads")


class UnevenModel:
    """What the models below add to the stock ones: after the stock ``__init__``, every layer is cut to its size."""

    decoder_path = "model"

    def __init__(self, config):
        # Stock code reads the sizes from the config, and a size that varies by layer cannot be read from it. So the
        # stock model is built from a copy in which all layers are alike.
        even = copy.deepcopy(config)
        even.per_layer_config = None
        super().__init__(even)
        config._attn_implementation_internal = even._attn_implementation_internal
        config._experts_implementation_internal = even._experts_implementation_internal
        for module in self.modules():
            # Rotary embeddings keep the even copy: some of their variants read head counts, even at run time.
            if getattr(module, "config", None) is even and not hasattr(module, "inv_freq"):
                module.config = config
        layers = self.get_submodule(self.decoder_path).layers
        for layer, sizes in zip(layers, config.per_layer_config, strict=True):
            self.resize_attention(layer, sizes)
            self.resize_mlp(layer, sizes)

    @staticmethod
    def resize_attention(layer, sizes):
        """Cuts q, k, v and o to the layer's heads."""
        attention = layer.self_attn
        if is_skipped("attention", sizes):
            layer.self_attn = Skipped(bias_of(attention.o_proj, "attention", sizes), attention=True)
            return
        queries, keys = (n * sizes.head_dim for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
        resize(attention.q_proj, out_features=queries)
        resize(attention.k_proj, out_features=keys)
        resize(attention.v_proj, out_features=keys)
        resize(attention.o_proj, in_features=queries)
        attention.o_proj.bias = bias_of(attention.o_proj, "attention", sizes)
        attention.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads

    @staticmethod
    def resize_mlp(layer, sizes):
        """Cuts gate, up and down to the layer's intermediate channels."""
        mlp = layer.mlp
        if is_skipped("mlp", sizes):
            layer.mlp = Skipped(bias_of(mlp.down_proj, "mlp", sizes), attention=False)
            return
        resize(mlp.gate_proj, out_features=sizes.intermediate_size)
        resize(mlp.up_proj, out_features=sizes.intermediate_size)
        resize(mlp.down_proj, in_features=sizes.intermediate_size)
        mlp.down_proj.bias = bias_of(mlp.down_proj, "mlp", sizes)
        mlp.intermediate_size = sizes.intermediate_size


def is_skipped(kind, sizes):
    """Whether the layer's config says that this half has nothing left."""
    return kind in getattr(sizes, "skip", ())


def resize(linear, in_features=None, out_features=None):
    """Keeps the first outputs or inputs of a linear layer, on its device (the meta device included) and dtype."""
    linear.in_features = linear.in_features if in_features is None else in_features
    linear.out_features = linear.out_features if out_features is None else out_features
    linear.weight = nn.Parameter(linear.weight.detach()[: linear.out_features, : linear.in_features].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[: linear.out_features].clone())


def bias_of(consumer, kind, sizes):
    """The output projection's own bias, a new one of zeros if the config asks for it, or ``None``."""
    if consumer.bias is None and kind in (sizes.consumer_bias or ()):
        return nn.Parameter(consumer.weight.new_zeros(consumer.out_features))
    return consumer.bias


class FFGymLlamaConfig(UnevenConfig, LlamaConfig):
    """Llama with ``per_layer_config``."""

    model_type = "ffgym_llama"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None


class FFGymLlamaForCausalLM(UnevenModel, LlamaForCausalLM):
    """Llama with layers of different sizes."""

    config_class = FFGymLlamaConfig
    _auto_class = "AutoModelForCausalLM"


class FFGymMistralConfig(UnevenConfig, MistralConfig):
    """Mistral with ``per_layer_config``."""

    model_type = "ffgym_mistral"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None


class FFGymMistralForCausalLM(UnevenModel, MistralForCausalLM):
    """Mistral with layers of different sizes."""

    config_class = FFGymMistralConfig
    _auto_class = "AutoModelForCausalLM"


class FFGymQwen2Config(UnevenConfig, Qwen2Config):
    """Qwen2 with ``per_layer_config``; stores ``head_dim``, which Qwen2 derives from the number of heads."""

    model_type = "ffgym_qwen2"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None
    head_dim: int | None = None


class FFGymQwen2ForCausalLM(UnevenModel, Qwen2ForCausalLM):
    """Qwen2 with layers of different sizes."""

    config_class = FFGymQwen2Config
    _auto_class = "AutoModelForCausalLM"


class FFGymQwen3Config(UnevenConfig, Qwen3Config):
    """Qwen3 with ``per_layer_config``."""

    model_type = "ffgym_qwen3"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None


class FFGymQwen3ForCausalLM(UnevenModel, Qwen3ForCausalLM):
    """Qwen3 with layers of different sizes."""

    config_class = FFGymQwen3Config
    _auto_class = "AutoModelForCausalLM"


class FFGymGemmaConfig(UnevenConfig, GemmaConfig):
    """Gemma with ``per_layer_config``."""

    model_type = "ffgym_gemma"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None


class FFGymGemmaForCausalLM(UnevenModel, GemmaForCausalLM):
    """Gemma with layers of different sizes."""

    config_class = FFGymGemmaConfig
    _auto_class = "AutoModelForCausalLM"


class FFGymOPTConfig(UnevenConfig, OPTConfig):
    """OPT with ``per_layer_config``; stores ``head_dim``, which OPT derives from the number of heads."""

    model_type = "ffgym_opt"
    _auto_class = "AutoConfig"
    consumer_bias: list[str] | None = None
    head_dim: int | None = None


class FFGymOPTForCausalLM(UnevenModel, OPTForCausalLM):
    """OPT with layers of different sizes."""

    config_class = FFGymOPTConfig
    _auto_class = "AutoModelForCausalLM"
    decoder_path = "model.decoder"

    @staticmethod
    def resize_attention(layer, sizes):
        """Cuts q, k, v and out to the layer's heads; OPT's attention also counts them itself."""
        attention = layer.self_attn
        if is_skipped("attention", sizes):
            layer.self_attn = Skipped(bias_of(attention.out_proj, "attention", sizes), attention=True)
            return
        channels = sizes.num_attention_heads * sizes.head_dim
        for producer in (attention.q_proj, attention.k_proj, attention.v_proj):
            resize(producer, out_features=channels)
        resize(attention.out_proj, in_features=channels)
        attention.out_proj.bias = bias_of(attention.out_proj, "attention", sizes)
        attention.num_heads = sizes.num_attention_heads

    @staticmethod
    def resize_mlp(layer, sizes):
        """Cuts fc1 and fc2. They live in the layer itself, so a skipped MLP is one of no channels: fc2's bias."""
        channels = 0 if is_skipped("mlp", sizes) else sizes.ffn_dim
        resize(layer.fc1, out_features=channels)
        resize(layer.fc2, in_features=channels)
        layer.fc2.bias = bias_of(layer.fc2, "mlp", sizes)


CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (FFGymLlamaConfig, FFGymLlamaForCausalLM),
    "mistral": (FFGymMistralConfig, FFGymMistralForCausalLM),
    "qwen2": (FFGymQwen2Config, FFGymQwen2ForCausalLM),
    "qwen3": (FFGymQwen3Config, FFGymQwen3ForCausalLM),
    "gemma": (FFGymGemmaConfig, FFGymGemmaForCausalLM),
    "opt": (FFGymOPTConfig, FFGymOPTForCausalLM),
}


def register() -> None:
    """Makes ``AutoModelForCausalLM`` know these classes in this process; a second call changes nothing."""
    for config_class, model_class in CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
