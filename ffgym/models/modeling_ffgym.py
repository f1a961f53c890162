"""Causal language models whose layers have different sizes, as pruned and saved by ffgym.

This file lies beside the weights and is all that loading them needs: it imports torch and transformers, takes the
stock model, and gives every layer the sizes that ``per_layer_config`` states. No stock ``forward`` is overridden.
A copy that lies beside weights ends with the call that makes the classes of their architecture.
"""

import copy
import functools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "ffgym_"  # what the model_type of these models begins with


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


class SkippedAttention(Skipped):
    """Stands for an attention with nothing left, so that vLLM takes it for one.

    vLLM makes room for the keys and values of every layer. It finds the modules that need it by what it reads in the
    source of ``forward`` (a call of what `ALL_ATTENTION_FUNCTIONS` gives), and by their ``config`` and ``layer_idx``.

    Args:
        attention: the module that it stands for.
        bias: the consumer's bias, shape (hidden,), or ``None``.
    """

    def __init__(self, attention: nn.Module, bias: torch.Tensor | None) -> None:
        super().__init__(bias, attention=True)
        self.config, self.layer_idx = attention.config, attention.layer_idx

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Nothing is attended to; the call is there to be read."""
        if hidden_states is None:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
            attend(self, hidden_states, hidden_states, hidden_states, None)
        return super().forward(hidden_states)


class SavedConfig:
    """A config that lies beside its weights together with the copy of this file that makes its classes."""

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the config and the copy, which ends with ``self.call``."""
        # Saving a model names its own class alone; servers such as vLLM ask for the one without a head.
        stem = Path(__file__).stem
        own = {auto_class: f"{stem}.{name}" for auto_class, name in self.model_classes.items()}
        self.auto_map = {**getattr(self, "auto_map", {}), **own}
        super().save_pretrained(save_directory, **kwargs)
        copied = Path(save_directory) / Path(__file__).name
        ending = f"\n\n{self.call}\n"
        if ending not in copied.read_text(encoding="utf-8"):  # a copy copies itself
            with copied.open("a", encoding="utf-8") as file:
                file.write(ending)


class UnevenConfig(SavedConfig):
    """What `make_classes` adds to a stock config.

    ``per_layer_config`` holds, for layers that differ from the config's own (dense) sizes, the number of heads and of
    intermediate channels or experts; ``skip: ["attention"]`` or ``["mlp"]`` for sublayers with nothing left; and
    ``consumer_bias``, with the same two words, where the output projection has a bias that the stock architecture
    does not know.
    """

    def __post_init__(self, **kwargs):
        if self.head_dim is None:  # from the dense head count, while there is still one for all layers
            self.head_dim = self.hidden_size // getattr(self, self.parts.heads)
        if hasattr(self, "logits_scaling"):  # Granite divides the logits by it, vLLM multiplies them by this
            self.logit_scale = 1 / self.logits_scaling
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def _attn_implementation_internal(self):
        """The model's own, in the config of a single layer too: a mask for one implementation is wrong for another."""
        return vars(vars(self).get("of_model", self)).get("_attn_implementation_internal")

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, implementation):
        vars(self)["_attn_implementation_internal"] = implementation

    @property
    def kv_sharing_modes(self):
        """Tells transformers' caches that skipped attention stores nothing; ``None`` when none is skipped."""
        skipped = [is_skipped("attention", sizes) for sizes in self.per_layer_config]
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
                raise ValueError(
                    "layer 0: attention cannot be skipped, because transformers reads the length of the KV cache there"
                )
            heads, kv_heads = head_counts(sizes, self.parts)
            if heads < 1 or kv_heads < 1 or heads % kv_heads:
                raise ValueError(f"layer {index}: {heads} query heads cannot share {kv_heads} key/value heads")

    def validate_rope(self):
        """The stock checks, which may divide by the number of heads: the dense one is meant."""
        even = copy.copy(self)
        even.per_layer_config = None
        super(UnevenConfig, even).validate_rope()


class TowersConfig(SavedConfig):
    """What `make_towers` adds to the stock config of a text model with other towers, e.g. one for images."""

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):  # stock code would make the stock config from it
            self.text_config = self.sub_configs["text_config"](**self.text_config)
        super().__post_init__(**kwargs)


class TowersModel:
    """What `make_towers` adds to a stock model; its text model is one that `make_classes` made."""

    def save_pretrained(self, *args, **kwargs):
        """Saves the weights under the names of the modules: those of old files hold for the stock class alone."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})


class UnevenModel:
    """What `make_classes` adds to a stock model: after the stock ``__init__``, every layer is cut to its size."""

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
            is_rotary = any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
            if getattr(module, "config", None) is even and not is_rotary:
                module.config = config
        decoder = config.parts.decoder.removeprefix(self.base_model_prefix).removeprefix(".")
        layers = self.base_model.get_submodule(decoder).layers
        for layer, sizes in zip(layers, config.per_layer_config, strict=True):
            resize_attention(layer, sizes, config.parts)
            resize_mlp(layer, sizes, config.parts)


def resize_attention(layer, sizes, parts):
    """Cuts query, key, value and the output projection to the layer's heads."""
    name = parts.attention_consumer.partition(".")[0]
    attention, consumer = getattr(layer, name), layer.get_submodule(parts.attention_consumer)
    bias = bias_of(consumer, "attention", sizes)
    if is_skipped("attention", sizes):
        setattr(layer, name, SkippedAttention(attention, bias))
        return
    heads, kv_heads = head_counts(sizes, parts)
    rows = Counter()  # names that are equal lead to one fused linear
    for producer, count in ((parts.query, heads), (parts.key, kv_heads), (parts.value, kv_heads)):
        rows[producer] += count * sizes.head_dim
    for producer, count in rows.items():
        resize(layer.get_submodule(producer), out_features=count)
    resize(consumer, in_features=heads * sizes.head_dim)
    consumer.bias = bias
    if any(attribute.startswith("config.") for attribute in parts.head_count_attributes):
        attention.config, sizes.of_model = sizes, attention.config
    count_heads(attention, heads, kv_heads, parts.head_count_attributes)


def count_heads(attention, heads, kv_heads, attributes):
    """Tells an attention module how many heads it has now, where it keeps these numbers."""
    for attribute in attributes:
        owner, _, name = attribute.rpartition(".")
        setattr(attention.config if owner else attention, name, heads)
    for name, count in (("num_key_value_groups", heads // max(1, kv_heads)), ("num_key_value_heads", kv_heads)):
        if hasattr(attention, name):
            setattr(attention, name, count)


def resize_mlp(layer, sizes, parts):
    """Cuts the MLP to the layer's intermediate channels, or the mixture of experts to its experts."""
    if found := expert_modules(layer, parts):
        count_experts(found, getattr(sizes, parts.expert_count))
        for module in found:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach()[: module.num_experts].clone()))
        return
    consumer = layer.get_submodule(parts.mlp_consumer)
    bias = bias_of(consumer, "mlp", sizes)
    if is_skipped("mlp", sizes):
        name, dot, _ = parts.mlp_consumer.partition(".")
        setattr(layer, name, Skipped(bias, attention=False))
        for producer in () if dot else parts.mlp_producers:  # no part of what was replaced
            layer.set_submodule(producer, nn.Identity())
        return
    channels = getattr(sizes, parts.intermediate)
    for producer, blocks in Counter(parts.mlp_producers).items():
        resize(layer.get_submodule(producer), out_features=blocks * channels)
    resize(consumer, in_features=channels)
    consumer.bias = bias


def expert_modules(layer, parts):
    """The experts of a layer and their router; nothing where it has an MLP."""
    names = (parts.experts, parts.router) if parts.experts else ()
    try:
        return [layer.get_submodule(name) for name in names]
    except AttributeError:
        return []


def count_experts(modules, experts):
    """Tells the experts of a layer and their router how many there are now."""
    for module in modules:
        module.num_experts = experts


def is_skipped(kind, sizes):
    """Whether the layer's config says that this half has nothing left."""
    return kind in getattr(sizes, "skip", ())


def head_counts(sizes, parts):
    """Query heads and key/value heads of a layer."""
    heads = getattr(sizes, parts.heads)
    kv_heads = None if parts.kv_heads is None else getattr(sizes, parts.kv_heads)
    return heads, heads if kv_heads is None else kv_heads  # Nemotron's config has none until one is given


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


@functools.cache
def make_classes(model_type, **parts):
    """Makes the classes of an architecture that transformers knows, as names of this module.

    They are its config, its causal language model, and the model below that one's head.

    Args:
        model_type: of the stock config.
        parts: what the architecture calls its parts; ffgym's ``Family`` says what each name means.
    """
    stock_config = CONFIG_MAPPING[model_type]
    stock_models = {
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING[stock_config],
        "AutoModel": MODEL_MAPPING[stock_config],
    }
    fields = {"consumer_bias": list[str] | None}
    if not hasattr(stock_config, "head_dim"):  # it would derive that from the number of heads, which now differs
        fields["head_dim"] = int | None
    names = "".join(f"    {name}={value!r},\n" for name, value in parts.items())
    content = {
        "__annotations__": fields,
        **dict.fromkeys(fields),
        "parts": SimpleNamespace(**parts),
        "call": f"make_classes(\n    {model_type!r},\n{names})",
    }
    return _classes(UnevenConfig, stock_config, content, UnevenModel, stock_models)


@functools.cache
def make_towers(model_type, text_config, text_model, text_base):
    """Makes the classes of an architecture of several towers, as names of this module.

    They are its config, its model, and the model below that one's head. Stock code builds the text model from its
    config through ``AutoModel``, so that nothing else has to be changed.

    Args:
        model_type: of the stock config.
        text_config, text_model, text_base: what `make_classes` made for the text model.
    """
    AutoModel.register(text_config, text_base, exist_ok=True)
    AutoModelForCausalLM.register(text_config, text_model, exist_ok=True)
    stock_config = CONFIG_MAPPING[model_type]
    stock_models = {
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[stock_config],
        "AutoModel": MODEL_MAPPING[stock_config],
    }
    content = {
        "sub_configs": {**stock_config.sub_configs, "text_config": text_config},
        "call": f"make_towers({model_type!r}, *{text_config.call})",
    }
    return _classes(TowersConfig, stock_config, content, TowersModel, stock_models)


def _classes(config_mixin, stock_config, content, model_mixin, stock_models):
    """The classes of one architecture: its config, and a model for each of the auto classes that load it."""
    config_class = type(
        f"FFGym{stock_config.__name__}",
        (config_mixin, stock_config),
        {
            "__doc__": f"{stock_config.__name__} of layers that differ in size.",
            "model_type": PREFIX + stock_config.model_type,
            "model_classes": {auto_class: f"FFGym{stock.__name__}" for auto_class, stock in stock_models.items()},
            "_auto_class": "AutoConfig",
            **content,
        },
    )
    model_classes = [
        type(
            f"FFGym{stock.__name__}",
            (model_mixin, stock),
            {
                "__doc__": f"{stock.__name__} with layers of different sizes.",
                "config_class": config_class,
                "_auto_class": auto_class,
                # transformers reads it from the source of a class, and says no of what is not written there.
                "_can_set_experts_implementation": stock._can_set_experts_implementation,
            },
        )
        for auto_class, stock in stock_models.items()
    ]
    globals().update({cls.__name__: cls for cls in (config_class, *model_classes)})
    return config_class, *model_classes
