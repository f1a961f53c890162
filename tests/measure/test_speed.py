"""Who runs when, on how many tokens, and what the ceilings are. How fast anything is, is not tested."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.costs.resource import standard_costs
from ffgym.costs.size import SizeMeter
from ffgym.measure.speed import (
    DECODE_TOKENS,
    Workload,
    generate,
    parameter_bytes,
    prompt,
    time_in_turn,
    work_of,
)
from ffgym.models.cut import PrunableModel
from ffgym.testing.models import tiny_model


def counted(model, log, name=""):
    """Log (name, tokens of every sequence, tokens in the cache before) of every forward pass."""

    def record(_, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        log.append((name, tuple(kwargs["input_ids"].shape), int(cache.get_seq_length())))

    model.base_model.register_forward_pre_hook(record, with_kwargs=True)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_decoding_goes_on_from_the_cache_of_the_prompts(family):
    log = []
    model = tiny_model(family)
    counted(model, log)
    prefill, decode = generate(model, prompt(model, Workload(2, 10)))
    assert log == [("", (2, 10), 0), *(("", (2, 1), 10 + step) for step in range(DECODE_TOKENS))]
    assert prefill > 0
    assert decode > 0


@torch.inference_mode()
def test_what_is_decoded_is_what_generate_decodes():
    model = tiny_model("llama")
    ids = prompt(model, Workload(2, 10))
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    generate(model, ids)
    model.base_model._forward_pre_hooks.clear()
    written = model.generate(ids, max_new_tokens=DECODE_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat(seen, dim=1), written)


def test_the_models_take_turns():
    log = []
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    counted(dense, log, "dense")
    counted(pruned, log, "pruned")
    turns = []
    found = time_in_turn(
        dense, pruned, Workload(1, 8), (1.5, 1.2), repetitions=3, on_turn=lambda: turns.append(len(log))
    )
    order = [name for name, shape, _ in log if shape == (1, 8)]
    assert order == ["dense", "pruned"] * 4  # one repetition warms up
    assert len(turns) == 8
    assert [(each.phase, each.workload, each.ceiling) for each in found] == [
        ("prefill", Workload(1, 8), 1.5),
        ("decode", Workload(1, 8), 1.2),
    ]


def test_rates_and_ratios_are_those_of_the_repetitions(monkeypatch):
    """The dense model takes 2 s and 4 s where the pruned takes 1 s; in the last repetition all is ten times slower."""
    seconds = [(99, 99), (99, 99), (2, 4), (1, 1), (2, 4), (1, 1), (20, 40), (10, 10)]
    ends = np.cumsum(seconds).tolist()
    clock = iter([0, *(end for end in ends[:-1] for _ in range(2)), ends[-1]])  # asked before and after each phase
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    model = tiny_model("llama")
    prefill, decode = time_in_turn(model, model, Workload(3, 10), (1.0, 1.0), repetitions=3)
    assert (prefill.dense.median, prefill.pruned.median) == (30 / 2, 30 / 1)
    assert (decode.dense.median, decode.pruned.median) == (3 * DECODE_TOKENS / 4, 3 * DECODE_TOKENS)
    assert (prefill.ratio.low, prefill.ratio.median, prefill.ratio.high) == (2, 2, 2)
    assert (decode.ratio.low, decode.ratio.median, decode.ratio.high) == (4, 4, 4)


def test_prompts_are_always_the_same():
    model = tiny_model("llama")
    ids = prompt(model, Workload(2, 5))
    assert ids.shape == (2, 5)
    assert torch.equal(ids, prompt(model, Workload(2, 5)))


def meter(context):
    prunable = PrunableModel(tiny_model("llama"))
    return SizeMeter(prunable, standard_costs(prunable.model, context=context))


class TestWork:
    """Llama: hidden 32, 4 query heads of 8 in 2 groups, 48 channels, 128 tokens, 3 layers, untied; float32."""

    linears = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    cache = 3 * 2 * 2 * 8 * 4

    def work(self, workload, kept=(2, 48) * 3, cut=False):
        prunable = PrunableModel(tiny_model("llama"))
        if cut:
            prunable.cut(kept)
        return work_of(prunable.model, kept, meter, workload)

    def test_prefill_counts_a_head_of_one_token_and_half_the_prompt_as_context(self):
        scores = 3 * 2 * 4 * 8 * 6  # q k^T and p v of 4 heads, 6 tokens on average
        assert self.work(Workload(4, 11))[0] == 11 * (self.linears + scores) + 32 * 128

    def test_decode_reads_the_weights_once_and_the_cache_of_every_sequence(self):
        weights = 4 * (self.linears + 128 * 32 + 7 * 32)  # the untied embedding is looked up, not read
        assert self.work(Workload(4, 11))[1] == weights + 4 * (11 + DECODE_TOKENS / 2) * self.cache

    def test_of_a_cut_model_less(self):
        kept = (1, 48, 2, 24, 2, 48)
        one = Workload(1, 1)
        dense, pruned = self.work(one), self.work(one, kept, cut=True)
        group, half = 32 * (16 + 8 + 8 + 16), 24 * 3 * 32
        assert dense[0] - pruned[0] == group + half + 2 * 2 * 8
        assert dense[1] - pruned[1] == 4 * (group + half) + (1 + DECODE_TOKENS / 2) * 2 * 8 * 4

    def test_of_experts_those_are_read_that_some_sequence_is_sent_to(self):
        """Each token is sent to 2 of 6 experts, so that one of them misses two sequences in 4/6 of 4/6 of all steps."""
        prunable = PrunableModel(tiny_model("mixtral"))
        family, model, units = prunable.family, prunable.model, prunable.dense_units
        size = SizeMeter(prunable, standard_costs(model, context=1))

        def read(batch):
            cached = batch * (1 + DECODE_TOKENS / 2) * size(units)["kv"]
            return work_of(model, units, lambda _: size, Workload(batch, 1))[1] - cached

        everything = parameter_bytes(model) - model.get_input_embeddings().weight.nbytes
        experts = sum(parameter_bytes(family.expert_modules(layer)[0]) for layer in family.layers(model))
        assert read(1) == pytest.approx(everything - experts * 4 / 6)
        assert read(2) == pytest.approx(everything - experts * 16 / 36)

    def test_a_tied_embedding_is_read_as_the_head(self):
        model = tiny_model("llama")
        untied = parameter_bytes(model)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert untied - parameter_bytes(model) == 4 * 128 * 32
        _, decode = work_of(model, (2, 48) * 3, meter, Workload(1, 1))
        assert decode == parameter_bytes(model) + (1 + DECODE_TOKENS / 2) * self.cache
