"""What each supported architecture calls its parts, and whatever else ffgym has to know about it.

The families that ship with ffgym are in ``built_in_families.py``.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ffgym.errors import ModelError, PluginError
from ffgym.models.modeling_ffgym import PREFIX, Skipped, expert_modules, head_counts, make_classes, make_towers
from ffgym.plugins import manager
from ffgym.plugins.architectures import family_name
from ffgym.plugins.bases import Plugin
from ffgym.plugins.contracts import call_plugin
from ffgym.types import Kind, Sublayer


@dataclass(frozen=True)
class Stock:
    """What a family's stock classes in transformers can say about a shape that all layers share.

    Attributes:
        heads: query-head counts they take: ``any``; ``divides hidden size``, which the config checks; or the ``dense``
            one alone, where the code derives the width of a head from it.
        attention_bias, mlp_bias: the config's switch that gives every linear of that half a bias; empty where there is
            none.
    """

    heads: Literal["any", "divides hidden size", "dense"] = "any"
    attention_bias: str = ""
    mlp_bias: str = ""

    def takes(self, heads: int, *, dense_heads: int, hidden: int) -> bool:
        """Whether a stock model may have this many query heads."""
        return {"any": True, "divides hidden size": hidden % heads == 0, "dense": heads == dense_heads}[self.heads]


NAMES = "Either the class in transformers has changed, or the family's names are wrong: compare them with print(model)."
# What `modeling_ffgym` has to know about a family.
PARTS = ("decoder", "query", "key", "value", "attention_consumer", "mlp_producers", "mlp_consumer", "heads", "kv_heads",
         "intermediate", "head_count_attributes", "experts", "router", "expert_count")  # fmt: skip


class Family(Plugin):
    """One architecture: names of its parts, and what follows from them. The defaults are Llama's.

    Within a decoder layer, dotted names lead to linear modules. Names that are equal (Phi-3's ``qkv_proj``) lead to one
    fused linear, whose outputs are those of the first, then those of the second, and so on.

    Attributes:
        name: the family, and the ``model_type`` of its Hugging Face config, which transformers must know.
        decoder: dotted path from the causal LM to the module that holds ``layers``.
        query, key, value, attention_consumer: names of an attention's linears.
        mlp_producers, mlp_consumer: names of an MLP's.
        experts, router: names of the modules that hold the experts of a layer and choose among them; empty where all
            layers have an MLP. The first dimension of each of their parameters counts experts.
        expert_count: the config's name for the number of experts.
        heads, kv_heads, intermediate: the config's names for the sizes (``kv_heads`` is ``None`` for multi-head only).
        whole_attention: an attention keeps all its heads or none, because something in it (a norm of all queries)
            depends on all of them.
        head_count_attributes: attributes of the attention module that hold its number of query heads; dotted for one of
            its config (``config.num_attention_heads``), of which it then gets a copy of its own.
        stock: shapes that its stock classes take; ``None`` where nobody has looked, so that uniform runs are refused.
        gguf: llama.cpp's architectures that may express it, names in ``ffgym.export.gguf.architectures``; the first
            one that can is taken. Empty where none is written.
        tiny: settings of the config that `ffgym.testing.models.tiny_model` needs beyond the sizes named above.
    """

    kind = "family"
    decoder: ClassVar[str] = "model"
    query: ClassVar[str] = "self_attn.q_proj"
    key: ClassVar[str] = "self_attn.k_proj"
    value: ClassVar[str] = "self_attn.v_proj"
    attention_consumer: ClassVar[str] = "self_attn.o_proj"
    mlp_producers: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_consumer: ClassVar[str] = "mlp.down_proj"
    heads: ClassVar[str] = "num_attention_heads"
    kv_heads: ClassVar[str | None] = "num_key_value_heads"
    intermediate: ClassVar[str] = "intermediate_size"
    whole_attention: ClassVar[bool] = False
    head_count_attributes: ClassVar[tuple[str, ...]] = ()
    experts: ClassVar[str] = ""
    router: ClassVar[str] = ""
    expert_count: ClassVar[str] = ""
    stock: ClassVar[Stock | None] = None
    gguf: ClassVar[tuple[str, ...]] = ()
    tiny: ClassVar[Mapping[str, Any]] = {}

    def saved_classes(self) -> tuple[Any, Any, Any]:
        """The classes of its checkpoints whose layers differ in size: config, causal LM, and that one without a head.

        Raises:
            PluginError: transformers has no such architecture.
        """
        parts = {part: getattr(self, part) for part in PARTS}
        classes: tuple[Any, Any, Any] = call_plugin(
            self, lambda: make_classes(self.name, **parts), "making the classes of its saved models"
        )
        return classes

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, first to last."""
        try:
            layers = model.get_submodule(self.decoder).get_submodule("layers")
        except AttributeError:
            raise self._missing(model, f"{self.decoder}.layers") from None
        return list(layers.children())

    def expert_modules(self, layer: nn.Module) -> list[Any]:
        """The experts of a layer and their router; nothing where it has an MLP."""
        found: list[Any] = expert_modules(layer, self)  # type: ignore[no-untyped-call]
        return found

    def consumer(self, layer: nn.Module, kind: Kind) -> nn.Linear:
        """The linear that reads the units of one half of a layer, which is not one of experts."""
        return self._linear(layer, self.attention_consumer if kind == "attention" else self.mlp_consumer)

    def has_half(self, layer: nn.Module, kind: Kind) -> bool:
        """Whether anything is left of one half of a layer, which is not one of experts."""
        try:
            consumer = layer.get_submodule(self.attention_consumer if kind == "attention" else self.mlp_consumer)
        except AttributeError:  # ``Skipped`` is in the place of the whole half
            return False
        return not isinstance(consumer, Skipped) and getattr(consumer, "in_features", 1) > 0

    def mlp(self, layer: Any) -> nn.Module:
        """A layer's MLP, which has something left, as a module of its inputs."""
        holder = self.mlp_consumer.rpartition(".")[0]
        if not holder:  # OPT's, whose parts live in the decoder layer itself
            return nn.Sequential(OrderedDict(fc1=layer.fc1, activation=layer.activation_fn, fc2=layer.fc2))
        mlp: nn.Module = layer.get_submodule(holder)
        return mlp

    def producers(self, layer: nn.Module, kind: Kind) -> list[nn.Linear]:
        """The linears that write them: query, key, value, or the MLP's; fused ones once."""
        return [self._linear(layer, name) for name in dict.fromkeys(self._producer_names(kind))]

    def _linear(self, layer: nn.Module, name: str) -> nn.Linear:
        try:
            module = layer.get_submodule(name)
        except AttributeError:
            raise self._missing(layer, name) from None
        if type(module) is not nn.Linear:  # one of a quantised model may be made from it, and holds codes
            raise ModelError(
                f"{name} is a {type(module).__name__}, not a plain linear layer",
                hint="Load the model without quantisation or adapters.",
            )
        return module

    def _missing(self, owner: Any, name: str) -> ModelError:
        return ModelError(f"a {type(owner).__name__} has no {name}, which family {self.name!r} says it has", hint=NAMES)

    def rows_per_unit(self, sublayer: Sublayer) -> list[tuple[int, ...]]:
        """How many outputs of each producer a unit owns; of a fused one, in each of its blocks."""
        rows = [1] * len(self.mlp_producers)
        if sublayer.kind == "attention":
            rows = [heads * sublayer.head_dim for heads in sublayer.heads_per_unit]
        found: dict[str, tuple[int, ...]] = {}
        for name, count in zip(self._producer_names(sublayer.kind), rows, strict=True):
            found[name] = (*found.get(name, ()), count)
        return list(found.values())

    def _producer_names(self, kind: Kind) -> tuple[str, ...]:
        return (self.query, self.key, self.value) if kind == "attention" else self.mlp_producers

    def head_dim(self, config: Any) -> int:
        """Channels of one attention head."""
        return int(getattr(config, "head_dim", None) or config.hidden_size // getattr(config, self.heads))

    def head_counts(self, config: Any) -> tuple[int, int]:
        """Query heads, and key/value heads, by a config of all layers or of one."""
        found: tuple[int, int] = head_counts(config, self)  # type: ignore[no-untyped-call]
        return found

    def stock_shapes(self, model: nn.Module) -> dict[Kind, tuple[int, ...]]:
        """Units that all attentions, and all MLPs, of a stock checkpoint may keep; ascending, the last = all.

        Raises:
            ModelError: the family's stock shapes are not known.
        """
        config: Any = model.config
        heads, kv_heads = self.head_counts(config)
        groups = 1 if self.whole_attention else kv_heads
        per_group, stock = heads // groups, self.known_stock()
        legal = [
            k for k in range(1, groups + 1) if stock.takes(k * per_group, dense_heads=heads, hidden=config.hidden_size)
        ]
        shapes: dict[Kind, tuple[int, ...]] = {"attention": tuple(legal)}
        for found in map(self.expert_modules, self.layers(model)):
            if found:
                shapes["experts"] = tuple(range(found[1].top_k, getattr(config, self.expert_count) + 1))
            else:
                shapes["mlp"] = tuple(range(1, getattr(config, self.intermediate) + 1))
        return shapes

    def check_stock_biases(self, model: nn.Module) -> None:
        """Refuse biases on all consumers, as affine calibration gives them, where a stock checkpoint cannot have them.

        Raises:
            ModelError: names the family and the linear.
        """
        layer = self.layers(model)[0]
        kinds: tuple[Kind, ...] = ("attention",) if self.expert_modules(layer) else ("attention", "mlp")
        for kind in kinds:
            if self.consumer(layer, kind).bias is None:
                self.bias_switch(kind)

    def bias_switch(self, kind: Kind) -> str:
        """The config's switch that gives every linear of a half of a stock checkpoint a bias.

        Raises:
            ModelError: there is none, or none is known; names the family and the linear.
        """
        is_attention, stock = kind == "attention", self.known_stock()
        if switch := stock.attention_bias if is_attention else stock.mlp_bias:
            return switch
        name = self.attention_consumer if is_attention else self.mlp_consumer
        raise ModelError(
            f"a stock {self.name} checkpoint has no bias on {name}, which affine calibration would give it",
            hint="Use --calibration ridge, or leave --uniform out.",
        )

    def known_stock(self) -> Stock:
        """What its stock classes take; raises ``ModelError`` where that is not known."""
        if self.stock is None:
            raise ModelError(
                f"which shapes a stock {self.name} checkpoint can have is not known, so none is written",
                hint="Leave --uniform out.",
            )
        return self.stock

    def sublayers(self, model: nn.Module) -> list[Sublayer]:
        """The 2L sublayers of a dense model: layer 0 attention, layer 0 mlp, layer 1 attention, ..."""
        for name in (self.heads, self.kv_heads, "" if self.experts else self.intermediate):
            if name and not hasattr(model.config, name):
                raise self._missing(model.config, name)
        head_dim = self.head_dim(model.config)
        layers = self.layers(model)
        return [s for i, layer in enumerate(layers) for s in self._halves(layer, i, head_dim, len(layers))]

    def _halves(self, layer: nn.Module, index: int, head_dim: int, depth: int) -> Iterator[Sublayer]:
        heads = self.consumer(layer, "attention").in_features // head_dim
        rows = sum(producer.out_features for producer in self.producers(layer, "attention"))
        groups = (rows // head_dim - heads) // 2  # what is not of queries is of keys and values
        units = 1 if self.whole_attention else groups
        yield self._priced(
            layer,
            Sublayer(
                layer=index,
                kind="attention",
                units=units,
                channels_per_unit=heads // units * head_dim,
                query_heads_per_unit=heads // units,
                kv_heads_per_unit=groups // units,
                head_dim=head_dim,
                depth=depth,
            ),
        )
        if found := self.expert_modules(layer):
            experts, router = found
            count = int(experts.num_experts)
            yield Sublayer(
                layer=index,
                kind="experts",
                units=count,
                channels_per_unit=1,
                unit_params=sum(p.numel() // count for module in found for p in module.parameters()),
                unit_macs=router.weight.numel() // count,
                depth=depth,
                experts_per_token=int(router.top_k),
            )
            return
        channels = self.consumer(layer, "mlp").in_features
        yield self._priced(layer, Sublayer(layer=index, kind="mlp", units=channels, channels_per_unit=1, depth=depth))

    def _priced(self, layer: nn.Module, half: Sublayer) -> Sublayer:
        """The same, with what goes with one unit of it."""
        consumer, producers = self.consumer(layer, half.kind), self.producers(layer, half.kind)
        rows = [sum(blocks) for blocks in self.rows_per_unit(half)]
        names = dict.fromkeys(self._producer_names(half.kind))
        for count, producer, name in zip(rows, producers, names, strict=True):
            if producer.out_features != count * half.units:
                is_fused = half.kind == "mlp" and producer.out_features == 2 * count * half.units
                raise ModelError(
                    f"{half.name}: family {self.name!r} names a producer with {producer.out_features} outputs, and its"
                    f" consumer reads {half.units * half.channels_per_unit} channels, which need {count * half.units}",
                    hint=f"A fused linear is named once for each part: mlp_producers = ({name!r}, {name!r})."
                    if is_fused
                    else NAMES,
                )
        weights = sum(r * p.in_features for r, p in zip(rows, producers, strict=True))
        weights += half.channels_per_unit * consumer.out_features
        biases = sum(r for r, p in zip(rows, producers, strict=True) if p.bias is not None)
        return replace(half, unit_params=weights + biases, unit_macs=weights)


def family_of(model: Any) -> Family:
    """The family of a loaded causal LM.

    Raises:
        ModelError: the architecture is not supported, or ffgym has pruned the model already.
    """
    kind = str(model.config.model_type)
    if kind.startswith(PREFIX):
        raise ModelError(
            f"this checkpoint ({kind}) was already pruned by ffgym",
            hint="Start from the dense model; a higher sparsity is one more run, with --init-from for its policy.",
        )
    return family_of_type(kind)


def dense_or_pruned_family_of(model: Any) -> Family:
    """The family of a loaded causal LM, pruned or not; raises ``ModelError`` where it is not supported."""
    return family_of_type(str(model.config.model_type))


def family_of_type(model_type: str) -> Family:
    """The family of a config's ``model_type``, of a dense checkpoint or of one that ffgym saved.

    Raises:
        ModelError: the architecture is not supported; names the nearest one that is, and all of them.
    """
    family: Family = manager.create("family", family_name(model_type))
    return family


def register(families: Iterable[Family]) -> None:
    """Make transformers' auto classes know the saved models of these families; a second call changes nothing.

    A family whose classes cannot be made is left out: its first use says why.
    """
    for family in families:
        with contextlib.suppress(PluginError):
            _register(AutoModelForCausalLM, *family.saved_classes())


def register_saved(config: Mapping[str, Any]) -> None:
    """Register the family of a model that ffgym saved, by its ``config.json``; do nothing for any other model."""
    model_type, text = config.get("model_type"), config.get("text_config")
    if not isinstance(model_type, str) or not model_type.startswith(PREFIX):
        return
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    with contextlib.suppress(ModelError, PluginError, KeyError):  # loading says what is wrong with it
        if inner is None:
            register([family_of_type(model_type)])
            return
        classes = family_of_type(str(inner)).saved_classes()
        _register(AutoModelForImageTextToText, *make_towers(model_type.removeprefix(PREFIX), *classes))


def _register(auto_class: Any, config_class: Any, model_class: Any, base_class: Any) -> None:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
    AutoModel.register(config_class, base_class, exist_ok=True)


def family_of_pair(pruned: Any, dense: Any, *, hint: str) -> Family:
    """The family of a dense model and a smaller one that was made from it.

    Args:
        pruned: as ffgym saved it, or any model of the dense one's family with smaller sublayers.
        dense: the model that it was made from.
        hint: the next step where they do not belong together.

    Raises:
        ModelError: an unsupported family, or two models that do not belong together; names what differs.
    """
    family, other = dense_or_pruned_family_of(pruned), dense_or_pruned_family_of(dense)
    if family.name != other.name:
        raise ModelError(f"the pruned model is of family {family.name!r}, the dense one of {other.name!r}", hint=hint)
    ours, theirs = (
        {
            "decoder layers": len(family.layers(model)),
            "hidden channels": model.config.hidden_size,
            "tokens in the vocabulary": model.config.vocab_size,
            "channels of a head": family.head_dim(model.config),
        }
        for model in (pruned, dense)
    )
    for what, count in ours.items():
        if count != theirs[what]:
            raise ModelError(f"the pruned model has {count} {what}, the dense one {theirs[what]}", hint=hint)
    return family
