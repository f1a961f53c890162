"""Prefill and decode of two models in turn: tokens per second, and how many times as fast the second one is.

Prefill: one forward pass of whole prompts into an empty KV cache, logits of the last position only, as generation does.
Decode: greedy steps of one token a sequence, on the cache that the prefill has filled.

Both models are in memory and take turns, repetition by repetition, so that whatever slows the machine down slows both.
The ratio is taken within a repetition, and its median over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ffgym.costs.size import SizeMeter
from ffgym.costs.timing import Spread, timed
from ffgym.models.families import dense_or_pruned_family_of
from ffgym.models.placement import devices_of
from ffgym.types import do_nothing

DECODE_TOKENS = 16

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do."""

    batch: int  # sequences at a time
    length: int  # tokens of each prompt, and so of the KV cache that decoding starts with


@dataclass(frozen=True)
class Speed:
    """One phase of one workload, dense beside pruned."""

    phase: Phase
    workload: Workload
    dense: Spread  # tokens per second, over the batch
    pruned: Spread  # the same of the pruned model
    # dense seconds over pruned seconds of the same repetition: how many times as fast the pruned model is
    ratio: Spread
    # the ratio that the work itself allows: of multiply-accumulates for prefill, of bytes read for decode
    ceiling: float


def work_of(
    model: Any, kept: Sequence[int], meter: Callable[[int], SizeMeter], workload: Workload
) -> tuple[float, float]:
    """What a model, dense or pruned, has to do at least.

    Args:
        model: the model itself: its parameters are counted as they are.
        meter: sizes of allocations of the dense model at a context.

    Returns:
        multiply-accumulates of the prefill of one sequence: a token attends to half the prompt on average, and one is
        projected. Bytes that an average step of decoding reads: all parameters but an input embedding that is not the
        output head too, once, and the cache of every sequence; of experts, as if all were equally likely, those that
        at least one sequence is sent to.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    size = meter((workload.length + 1) // 2)(kept)
    prefill = workload.length * (size["macs"] - head.numel()) + head.numel()
    unread: float = 0 if embedding.data_ptr() == head.data_ptr() else embedding.nbytes
    family = dense_or_pruned_family_of(model)
    for experts, router in filter(None, map(family.expert_modules, family.layers(model))):
        unread += (1 - router.top_k / experts.num_experts) ** workload.batch * parameter_bytes(experts)
    cached = workload.batch * (workload.length + DECODE_TOKENS / 2)
    return prefill, parameter_bytes(model) - unread + cached * size["kv"]


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def time_in_turn(
    dense: Any,
    pruned: Any,
    workload: Workload,
    ceilings: tuple[float, float],
    *,
    repetitions: int,
    on_turn: Callable[[], None] = do_nothing,
) -> list[Speed]:
    """Prefill and decode of both models on one workload.

    Args:
        workload: batch and length; the models must take 16 tokens more.
        ceilings: of prefill and decode, see `Speed`.
        repetitions: that count; one more, which warms up, does not.
        on_turn: called after every turn of a model, 2 * (repetitions + 1) times.
    """
    ids = prompt(dense, workload)
    seconds = np.empty((repetitions + 1, 2, 2))  # repetition, model, phase
    for repetition in range(repetitions + 1):
        for index, model in enumerate((dense, pruned)):
            seconds[repetition, index] = generate(model, ids)
            on_turn()
    seconds = seconds[1:]
    tokens = workload.batch * np.array([workload.length, DECODE_TOKENS])
    rates = tokens / seconds
    ratios = seconds[:, 0] / seconds[:, 1]
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    return [
        Speed(phase, workload, Spread.of(rates[:, 0, i]), Spread.of(rates[:, 1, i]), Spread.of(ratios[:, i]), ceiling)
        for i, (phase, ceiling) in enumerate(zip(phases, ceilings, strict=True))
    ]


def prompt(model: Any, workload: Workload) -> torch.Tensor:
    """Token ids, shape (batch, length), int64: always the same ones."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (workload.batch, workload.length), generator=generator)
    return ids.to(embedding.weight.device)


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Fill a cache with prompts, then decode 16 tokens greedily.

    Returns:
        seconds of the prefill and of all decoding steps.
    """
    from transformers import DynamicCache

    devices = devices_of(model)
    cache = {_cache_argument(model): DynamicCache(config=model.config)}

    def step(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=tokens, use_cache=True, **cache).last_hidden_state[:, -1:]
        following: torch.Tensor = model.get_output_embeddings()(hidden).argmax(dim=-1).to(ids.device)
        return following

    def decode() -> None:
        tokens = following
        for _ in range(DECODE_TOKENS):
            tokens = step(tokens)

    following, prefill_seconds = timed(lambda: step(ids), devices)
    return prefill_seconds, timed(decode, devices)[1]


def _cache_argument(model: Any) -> str:
    """What this version of transformers calls the KV cache in a model's arguments."""
    names = inspect.signature(model.base_model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
