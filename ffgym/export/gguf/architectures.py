"""Which of llama.cpp's architectures can express a model.

llama.cpp has one piece of code for each architecture, and most of them read one size for all layers. What stands here
was read in its sources: the family's own architecture where the layers are alike, and where they differ one that reads
sizes per layer and otherwise computes the same. What no candidate can say is refused by name.

Checked against llama.cpp 0.5.0-dev, the one inside llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from ffgym.errors import ModelError, UnknownNameError
from ffgym.export.format import OTHERWISE
from ffgym.models.families import Family, family_of_type

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL_LINEARS = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
GELU = "gelu_pytorch_tanh"
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp: what its code (``src/models/NAME.cpp``) reads."""

    name: str  # general.architecture
    activation: str = "silu"  # of the MLP, as Hugging Face calls it
    biases: frozenset[str] = frozenset()  # the linears whose bias it reads
    uneven: bool = False  # whether it reads head counts and feed-forward lengths per layer
    skips_attention: bool = False  # whether a layer may have no head at all
    # whether channels 2i and 2i + 1 of a head are rotated together, not i and i + head_dim / 2
    neighbours_rotate: bool = False
    rope_factors: bool = False  # whether it reads a factor for every rotary frequency
    fused: bool = False  # whether query, key and value are one matrix
    untied: bool = True  # whether it reads an output matrix of its own
    wide_heads: bool = True  # whether heads times their channels may differ from the hidden size
    norm_shift: float = 0.0  # what it expects to have been added to the weights of norms
    post_norms: bool = False  # whether what each half writes passes through a norm
    windows: bool = False  # whether some layers attend to a sliding window, with rotary frequencies of their own
    soft_caps: bool = False  # whether it caps attention scores
    # the depth by which it knows the family's largest model, and there alone scales attention scores by the hidden size
    # over the number of heads instead of the channels of a head; 0 for never
    largest: int = 0


# deci (Nemotron's) is llama with sizes per layer, and takes Qwen2's biases; openelm is Qwen3's layer with them, as long
# as the embedding is the output matrix too.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", biases=ALL_LINEARS, neighbours_rotate=True, rope_factors=True),
        Architecture(
            "deci", biases=ALL_LINEARS, uneven=True, skips_attention=True, neighbours_rotate=True, rope_factors=True
        ),
        Architecture("qwen2", biases=QKV, wide_heads=False),
        Architecture("qwen3", biases=QKV),
        Architecture("openelm", uneven=True, fused=True, untied=False),
        Architecture("gemma", GELU, biases=QKV, untied=False, norm_shift=1.0),
        Architecture(
            "gemma2",
            GELU,
            biases=QKV,
            untied=False,
            norm_shift=1.0,
            post_norms=True,
            windows=True,
            soft_caps=True,
            largest=46,
        ),
        Architecture("gemma3", GELU, biases=QKV, norm_shift=1.0, post_norms=True, windows=True, largest=62),
    )
}


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer; no heads, or no channels, where that half has nothing left."""

    heads: int
    kv_heads: int
    channels: int

    @property
    def written_channels(self) -> int:
        """An MLP with nothing left is written as one channel of zeros: of none, deci would drop the whole layer."""
        return max(1, self.channels)


@dataclass(frozen=True)
class Contents:
    """What a folder holds, as far as an architecture has to say it."""

    family: Family  # whose gguf names the architectures that may express it
    config: Any  # the Hugging Face config
    layers: tuple[Layer, ...]  # their sizes
    tensors: Container[str]  # names in the checkpoint

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.family.head_dim(self.config)

    @property
    def activation(self) -> str:
        """Of the MLP."""
        return str(getattr(self.config, "hidden_activation", None) or self.config.hidden_act)

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embeddings: their ``rope_type``, ``rope_theta`` and what the type needs; of the whole text."""
        stated = self.config.rope_parameters or {}
        return {"rope_type": "default", "rope_theta": 10000.0, **stated.get("full_attention", stated)}

    @property
    def window_rope(self) -> dict[str, Any]:
        """Those of the layers that attend to a sliding window."""
        stated = self.config.rope_parameters or {}
        return {**self.rope, **stated.get("sliding_attention", {})}

    @property
    def sliding(self) -> list[bool]:
        """Which layers attend to a sliding window only."""
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.layers)
        return [kind == "sliding_attention" for kind in kinds]

    def context_length(self, architecture: Architecture) -> int:
        """Tokens; no more than a sliding window where the architecture attends to everything."""
        longest = self.config.max_position_embeddings
        window = None if architecture.windows else getattr(self.config, "sliding_window", None)
        return int(min(longest, window or longest))

    def biased(self, index: int) -> list[str]:
        """The linears of a layer whose bias the file has to hold."""
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        names = [f"{attention}.{name}_proj" for name in "qkvo"] + [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        found = [name.rpartition(".")[2] for name in names if f"{name}.bias" in self.tensors]
        return [*found, "down_proj"] if self.shifts(index) else found

    def shifts(self, index: int) -> list[str]:
        """The vectors that a layer's MLP adds at every position, whatever the input; shape (hidden,) each.

        Its own bias is one. What is left of the next layer's attention, where that was removed, is another: nothing
        reads the hidden states between the two.
        """
        mlp, attention = f"model.layers.{index}.mlp", f"model.layers.{index + 1}.self_attn"
        names = (f"{mlp}.down_proj.bias", f"{mlp}.bias", f"{attention}.bias")
        return [name for name in names if name in self.tensors]


def read_contents(config: Any, tensors: Container[str]) -> Contents:
    """What the config of a stock model, or of one that ffgym saved, says.

    Raises:
        ModelError: a family that llama.cpp or ffgym does not know, rotary embeddings that are not written.
    """
    family = family_of_type(str(config.model_type))
    if not family.gguf:
        raise ModelError(
            f"ffgym does not write models of family {family.name!r} as GGUF files",
            hint=f"docs/models.md says what can be written. {OTHERWISE}",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("a quantised model is not written as GGUF", hint="Export it as it was before that.")
    contents = Contents(family, config, tuple(map(_layer, config.per_layer_config)), tensors)
    if contents.rope["rope_type"] not in ROPE_TYPES or contents.rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"rotary embeddings {contents.rope} are not written as GGUF",
            hint=f"Types that are, over whole heads: {', '.join(ROPE_TYPES)}. {OTHERWISE}",
        )
    return contents


def _layer(sizes: Any) -> Layer:
    skip = getattr(sizes, "skip", ())
    attention, mlp = "attention" not in skip, "mlp" not in skip
    return Layer(
        heads=sizes.num_attention_heads if attention else 0,
        kv_heads=sizes.num_key_value_heads if attention else 0,
        channels=sizes.intermediate_size if mlp else 0,
    )


def choose_architecture(contents: Contents) -> Architecture:
    """The first candidate that can say the model.

    Raises:
        ModelError: none can; says what each lacks, and the shortest way round all that one of them lacks, if there is
            one.
        UnknownNameError: the family names an architecture that ffgym does not know.
    """
    reasons, ways = [], list[list[str]]()
    for name in contents.family.gguf:
        if name not in ARCHITECTURES:
            raise UnknownNameError("architecture of llama.cpp", name, ARCHITECTURES)
        architecture = ARCHITECTURES[name]
        lacking = list(_lacking(architecture, contents))
        if not lacking:
            return architecture
        reasons.append(f"llama.cpp's {architecture.name} {' and '.join(what for what, _ in lacking)}")
        if all(way for _, way in lacking):
            ways.append([way for _, way in lacking])
    shortest = min(ways, key=len, default=[f"docs/models.md says what can be written. {OTHERWISE}"])
    raise ModelError(
        f"this {contents.family.name} model cannot be written as a GGUF file: {'; '.join(reasons)}",
        hint=" ".join(shortest),
    )


def _lacking(architecture: Architecture, contents: Contents) -> Iterator[tuple[str, str]]:
    """What an architecture cannot represent of the model, each with the way round it or nothing."""
    config, layers = contents.config, contents.layers
    sizes = [(layer.heads, layer.kv_heads, layer.written_channels) for layer in layers]
    if not architecture.uneven and (other := next((i for i, size in enumerate(sizes) if size != sizes[0]), 0)):
        way = "Prune with --uniform, which gives all layers one shape."
        yield f"reads one size for all layers (layer {other} has another than layer 0)", way
    if not architecture.skips_attention and not all(layer.heads for layer in layers):
        index = next(index for index, layer in enumerate(layers) if not layer.heads)
        yield f"needs attention in every layer (layer {index} has none)", "Prune with --set prune.min_units=1."
    if not architecture.untied and not config.tie_word_embeddings:
        yield "has no output matrix of its own", ""
    wide = [i for i, layer in enumerate(layers) if layer.heads * contents.head_dim != config.hidden_size]
    if wide and not architecture.wide_heads:
        yield f"needs heads times their channels to be the hidden size (layer {wide[0]})", ""
    if contents.activation != architecture.activation:
        yield f"computes {architecture.activation}, not {contents.activation}", ""
    by_hidden = len(layers) == architecture.largest and layers[0].heads
    scale = config.hidden_size // layers[0].heads if by_hidden else contents.head_dim
    if (wanted := getattr(config, "query_pre_attn_scalar", scale)) != scale:
        yield f"divides attention scores by the root of {scale}, not of {wanted}", ""
    if architecture.soft_caps != bool(getattr(config, "attn_logit_softcapping", None)):
        yield f"{'caps' if architecture.soft_caps else 'does not cap'} attention scores", ""
    unread = [(i, name) for i in range(len(layers)) for name in contents.biased(i) if name not in architecture.biases]
    if unread:
        index, name = unread[0]
        ours = name in ("o_proj", "down_proj")
        way = "Prune with --calibration ridge, which adds none." if ours else ""
        yield f"reads no bias of {name} (layer {index} has one)", way
    if contents.rope["rope_type"] == "llama3" and not architecture.rope_factors:
        yield "reads no factors for rotary frequencies", ""
    if architecture.windows and contents.window_rope["rope_type"] != "default":
        yield "does not scale rotary positions within a sliding window", ""
