"""What each supported architecture calls its parts. Adding a family is adding an entry to ``FAMILIES``.

Within a layer, dotted names lead to linear modules. A family whose decoder layer does something else between these
linears (a norm over the intermediate channels, fused q/k/v) does not belong here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ffgym.errors import ModelError
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

    def bias_switch(self, kind: Kind) -> str:
        """The switch of one half."""
        return self.attention_bias if kind == "attention" else self.mlp_bias

    def takes(self, heads: int, *, dense_heads: int, hidden: int) -> bool:
        """Whether a stock model may have this many query heads."""
        return {"any": True, "divides hidden size": hidden % heads == 0, "dense": heads == dense_heads}[self.heads]


@dataclass(frozen=True)
class Family:
    """Names of one architecture's parts.

    Attributes:
        name: the family, and the ``model_type`` of its Hugging Face config.
        decoder: dotted path from the causal LM to the module that holds ``layers``.
        query, key, value, attention_consumer: dotted names within a decoder layer.
        mlp_producers, mlp_consumer: the same for the MLP.
        heads, kv_heads, intermediate: the config's names for the sizes (``kv_heads`` is ``None`` for multi-head only).
        head_count_attributes: attributes of the attention module that hold its number of query heads.
        stock: shapes that its stock classes take; ``None`` where nobody has looked, so that uniform runs are refused.
    """

    name: str
    decoder: str = "model"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_consumer: str = "self_attn.o_proj"
    mlp_producers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_consumer: str = "mlp.down_proj"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    intermediate: str = "intermediate_size"
    head_count_attributes: tuple[str, ...] = ()
    stock: Stock | None = None

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return list(model.get_submodule(self.decoder).get_submodule("layers").children())

    def consumer(self, layer: nn.Module, kind: Kind) -> nn.Linear:
        """The linear that reads the units of one half of a layer."""
        return _linear(layer, self.attention_consumer if kind == "attention" else self.mlp_consumer)

    def producers(self, layer: nn.Module, kind: Kind) -> list[nn.Linear]:
        """The linears that write them: query, key, value, or the MLP's."""
        names = (self.query, self.key, self.value) if kind == "attention" else self.mlp_producers
        return [_linear(layer, name) for name in names]

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one attention head."""
        config: Any = model.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // getattr(config, self.heads))

    def stock_shapes(self, model: nn.Module) -> dict[Kind, tuple[int, ...]]:
        """Units that all attentions, and all MLPs, of a stock checkpoint may keep; ascending, the last = all.

        Raises:
            ModelError: the family's stock shapes are not known.
        """
        config: Any = model.config
        heads = getattr(config, self.heads)
        groups = heads if self.kv_heads is None else getattr(config, self.kv_heads)
        per_group, stock = heads // groups, self.known_stock()
        legal = [
            k for k in range(1, groups + 1) if stock.takes(k * per_group, dense_heads=heads, hidden=config.hidden_size)
        ]
        return {"attention": tuple(legal), "mlp": tuple(range(1, getattr(config, self.intermediate) + 1))}

    def check_stock_biases(self, model: nn.Module) -> None:
        """Refuse biases on all consumers, as affine calibration gives them, where a stock checkpoint cannot have them.

        Raises:
            ModelError: names the family and the linear.
        """
        stock, layer = self.known_stock(), self.layers(model)[0]
        kinds: tuple[Kind, Kind] = ("attention", "mlp")
        for kind in kinds:
            if self.consumer(layer, kind).bias is None and not stock.bias_switch(kind):
                name = self.attention_consumer if kind == "attention" else self.mlp_consumer
                raise ModelError(
                    f"a stock {self.name} checkpoint has no bias on {name}, which affine calibration would give it",
                    hint="Use --calibration ridge, or leave --uniform out.",
                )

    def known_stock(self) -> Stock:
        """What its stock classes take; raises ``ModelError`` where that is not known."""
        if self.stock is None:
            known = sorted(name for name, family in FAMILIES.items() if family.stock is not None)
            raise ModelError(
                f"which shapes a stock {self.name} checkpoint can have is not known, so none is written",
                hint=f"Leave --uniform out. Families that have one: {', '.join(known)}.",
            )
        return self.stock

    def sublayers(self, model: nn.Module) -> list[Sublayer]:
        """The 2L sublayers of a dense model: layer 0 attention, layer 0 mlp, layer 1 attention, ..."""
        head_dim = self.head_dim(model)
        layers = self.layers(model)
        return [s for i, layer in enumerate(layers) for s in self._halves(layer, i, head_dim, len(layers))]

    def _halves(self, layer: nn.Module, index: int, head_dim: int, depth: int) -> Iterator[Sublayer]:
        query, key, _ = self.producers(layer, "attention")
        groups = key.out_features // head_dim
        heads_per_group = query.out_features // key.out_features
        sizes: list[tuple[Kind, int, int, int]] = [
            ("attention", groups, heads_per_group, head_dim),
            ("mlp", self.consumer(layer, "mlp").in_features, 0, 0),
        ]
        for kind, units, query_heads, dim in sizes:
            consumer, producers = self.consumer(layer, kind), self.producers(layer, kind)
            rows = [p.out_features // units for p in producers]
            columns = consumer.in_features // units
            weights = sum(r * p.in_features for r, p in zip(rows, producers, strict=True))
            weights += columns * consumer.out_features
            biases = sum(r for r, p in zip(rows, producers, strict=True) if p.bias is not None)
            yield Sublayer(
                layer=index,
                kind=kind,
                units=units,
                channels_per_unit=columns,
                unit_params=weights + biases,
                unit_macs=weights,
                query_heads_per_unit=query_heads,
                head_dim=dim,
                depth=depth,
            )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", stock=Stock("divides hidden size", attention_bias="attention_bias", mlp_bias="mlp_bias")),
        Family("mistral", stock=Stock()),
        Family("qwen2", stock=Stock()),
        Family("qwen3", stock=Stock(attention_bias="attention_bias")),
        Family("gemma", stock=Stock(attention_bias="attention_bias")),
        Family(
            "opt",
            decoder="model.decoder",
            attention_consumer="self_attn.out_proj",
            mlp_producers=("fc1",),
            mlp_consumer="fc2",
            kv_heads=None,
            intermediate="ffn_dim",
            head_count_attributes=("num_heads",),
            stock=Stock("dense"),
        ),
    )
}

PRUNED = "ffgym_"  # what the model_type of a checkpoint that ffgym pruned begins with
# What makes architectures that people ask for more than an entry above.
OTHER_LAYERS = {
    "gemma2": "its attention scores are soft-capped, which scaled dot product attention cannot do, and what attention "
    "and MLP add passes through norms of its own (sandwich norms), which the refit of a linear leaves out",
}


def family_of(model: nn.Module) -> Family:
    """The family of a loaded causal LM.

    Raises:
        ModelError: the architecture is not supported; names it and lists those that are.
    """
    config: Any = model.config
    kind = str(config.model_type)
    if kind.startswith(PRUNED):
        raise ModelError(
            f"this checkpoint ({kind}) has been pruned by ffgym already",
            hint="Start from the dense model; a higher sparsity is one more run, with --init-from for its policy.",
        )
    return dense_or_pruned_family_of(model)


def dense_or_pruned_family_of(model: nn.Module) -> Family:
    """The family of a loaded causal LM, whether ffgym has pruned it or not; in a pruned one, modules may be missing.

    Raises:
        ModelError: the architecture is not supported; names it and lists those that are.
    """
    config: Any = model.config
    return family_of_type(str(config.model_type))


def family_of_type(model_type: str) -> Family:
    """The family that a config names, before any weight is loaded.

    Raises:
        ModelError: the architecture is not supported; says why where that is known, and lists those that are.
    """
    family = FAMILIES.get(model_type.removeprefix(PRUNED))
    if family is None:
        known = f"Supported families: {', '.join(sorted(FAMILIES))}."
        if why := OTHER_LAYERS.get(model_type):
            raise ModelError(f"architecture {model_type!r} is not supported: {why}", hint=known)
        raise ModelError(
            f"architecture {model_type!r} is not supported",
            hint=f"{known} A family is one entry in ffgym/models/families.py.",
        )
    return family


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    if type(module) is not nn.Linear:  # one of a quantised model may be made from it, and holds codes
        raise ModelError(
            f"{name} is a {type(module).__name__}, not a plain linear layer",
            hint="Load the model without quantisation or adapters.",
        )
    return module
