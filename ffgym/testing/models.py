"""A small random language model of every family.

They are made for plugin authors as much as for ffgym: a criterion or reward that behaves on them has met biases,
grouped and multi-head attention, tied embeddings and both kinds of MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ffgym.plugins import manager
from ffgym.plugins.built_ins import BUILTINS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERT_FAMILIES = tuple(name for name in BUILTINS["family"] if manager.get_class("family", name).experts)
"""Names of the families that ship with ffgym whose layers have a mixture of experts, most of them or all."""

TINY_FAMILIES = tuple(name for name in BUILTINS["family"] if name not in EXPERT_FAMILIES)
"""Names of those whose layers have an MLP."""


def tiny_model(
    family: str,
    *,
    grouped_query: bool = True,
    layers: int = 3,
    head_dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A stock Hugging Face causal LM with random weights, in evaluation mode; the same arguments give the same bits.

    4 query heads, as many hidden channels as these have together, 48 intermediate channels, 128 tokens, 128 positions.
    Weights are large enough for logits to differ clearly between tokens, norms are no identities, and biases, where the
    family has them, are not zero.

    Args:
        family: a registered name, e.g. one of ``TINY_FAMILIES``.
        grouped_query: two query heads share each of 2 key/value heads; otherwise 4 of them (OPT has only that).

    Returns:
        The model, on the CPU.

    Raises:
        UnknownNameError: an unknown family.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    own, config_class = manager.get_class("family", family), CONFIG_MAPPING[family]
    sizes: dict[str, Any] = {own.heads: 4, own.intermediate: 48, **own.tiny}
    if "layer_types" in sizes:
        sizes["layer_types"] = (sizes["layer_types"] * layers)[:layers]
    if own.kv_heads is not None:
        sizes[own.kv_heads] = 2 if grouped_query else 4
    if hasattr(config_class, "head_dim"):
        sizes["head_dim"] = head_dim
    config = config_class(
        vocab_size=128,
        hidden_size=4 * head_dim,
        num_hidden_layers=layers,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # gpt-oss draws its sinks, and vectors are only shifted below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # .to(dtype) would round the rotary angles too
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: matrices with spread 0.25, everything else shifted by 0.2 from its first value."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.2 * noise)
