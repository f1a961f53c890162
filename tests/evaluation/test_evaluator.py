"""Layer by layer, shared and in any order: the bits of each request are those of ordinary calls of the cut model."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_examples import made_up_examples
from measured_alone import measured_alone

from ffgym.criteria.wanda import Wanda
from ffgym.errors import ModelError
from ffgym.evaluation.evaluator import ModelEvaluator, Request
from ffgym.evaluation.perplexity import evaluate, head_share
from ffgym.execute.shares import joined, parts
from ffgym.prepare.paths import prepare
from ffgym.testing.models import tiny_model

TOKENS_PER_BATCH = 60  # three windows of 20 tokens
EVERYTHING = frozenset({"kl", "reverse_kl", "accuracy", "slopes"})


EXAMPLES = [*made_up_examples(4, "a"), *made_up_examples(4, "b", seed=1)]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 128, (8, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prepared():
    """``prepared(family)``: a tiny model with its paths, one for all tests: whatever they do leaves it dense."""
    calibration = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    known = {}

    def make(family, how="ridge", dtype=torch.float32):
        key = family, how, dtype
        if key not in known:
            model = tiny_model(family, dtype=dtype)
            known[key] = prepare(model, Wanda(), calibration, ridge=0.01, calibration=how).prunable
        return known[key]

    return make


def evaluator(prunable, windows, **options):
    options = {"examples": EXAMPLES, "tokens_per_batch": TOKENS_PER_BATCH, **options}
    return ModelEvaluator(prunable, windows, **options)


def bits(evaluation):
    slopes = None if evaluation.slopes is None else [each.tolist() for each in evaluation.slopes]
    return repr((replace(evaluation, slopes=None), slopes))  # repr shows every bit, and NaN equals NaN


def requests_for(dense_units, *, needs=EVERYTHING):
    """A request: often one of few levels, so that several agree on a layer or on all of them."""
    levels = [st.sampled_from(sorted({0, 1, units // 2, units - 1, units})) for units in dense_units]
    kept = st.one_of(
        st.tuples(*levels), st.just(tuple(dense_units)), st.just(tuple(max(1, u // 2) for u in dense_units))
    )
    return st.builds(
        Request,
        kept=kept,
        windows=st.lists(st.integers(0, 7), min_size=1, max_size=5).map(tuple) | st.just((0, 1, 2, 3)),
        examples=st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True).map(tuple),
        needs=st.frozensets(st.sampled_from(sorted(needs))),
        slopes_of=st.sampled_from(["loss", "kl", "reverse_kl"]),
    )


class TestBits:
    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    @given(data=st.data())
    @settings(max_examples=5)
    def test_are_those_of_one_request_at_a_time(self, family, data, prepared, windows):
        """Any mixture of allocations, text, examples and needs, duplicates too, over several calls."""
        prunable = prepared(family)
        one = evaluator(prunable, windows)
        for _ in range(2):
            requests = data.draw(st.lists(requests_for(prunable.dense_units), min_size=1, max_size=5))
            if data.draw(st.booleans()):
                requests.append(requests[0])
            for request, got in zip(requests, one.measure(requests), strict=True):
                alone = measured_alone(prunable, request, windows, EXAMPLES, tokens_per_batch=TOKENS_PER_BATCH)
                assert bits(got) == bits(alone)
                assert bits(evaluator(prunable, windows).measure([request])[0]) == bits(alone)

    @given(data=st.data())
    @settings(max_examples=10)
    def test_are_those_of_its_windows_measured_apart(self, data, prepared, windows):
        """As workers do where slopes are asked for."""
        prunable = prepared("llama")
        request = data.draw(requests_for(prunable.dense_units))
        apart = [evaluator(prunable, windows).measure([part])[0] for part in parts(request)]
        assert len(apart) == (len(request.windows) if "slopes" in request.needs else 1)
        assert bits(joined(apart)) == bits(evaluator(prunable, windows).measure([request])[0])

    @pytest.mark.parametrize("how", ["ridge", "affine", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama", "opt"])
    def test_are_those_of_the_cut_model(self, family, how, dtype, prepared, windows):
        """Every refit and dtype; sublayers that vanish, and levels that only half a layer shares."""
        prunable, calibrated = prepared(family, how, dtype), how != "none"
        heads = prunable.dense_units[0]
        cuts = [(1, 20, heads, 48, 1, 48), (1, 30, heads, 48, 1, 20), (0, 20, 1, 0, heads, 20), (1, 20, 0, 0, 0, 0)]
        requests = [Request(kept, (0, 1, 2, 3)) for kept in cuts]
        found = evaluator(prunable, windows, calibrated=calibrated).measure(requests)
        for kept, got in zip(cuts, found, strict=True):
            prunable.cut(kept, calibrated=calibrated)
            alone = evaluate(prunable.model, windows[:4], tokens_per_batch=TOKENS_PER_BATCH)
            prunable.restore()
            assert got == alone

    def test_do_not_depend_on_the_order(self, prepared, windows):
        prunable = prepared("llama")
        rng = np.random.default_rng(0)
        kept = [tuple(int(rng.integers(1, units + 1)) for units in prunable.dense_units) for _ in range(4)]
        requests = [Request(k, (2, 3, 5), (0, 1), EVERYTHING) for k in kept]
        forwards = evaluator(prunable, windows).measure(requests)
        backwards = evaluator(prunable, windows).measure(requests[::-1])
        assert [bits(e) for e in forwards] == [bits(e) for e in backwards[::-1]]


class TestDense:
    def test_a_window_or_an_example_goes_alone_and_once(self, prepared, windows):
        """Kernels round by batch size, so a batch of whatever is missing would let history into the rewards."""
        prunable = prepared("llama")
        calls = layer_calls(prunable)
        one = evaluator(prunable, windows)
        asked = Request(prunable.dense_units, (1, 2, 4), (0, 1), frozenset({"accuracy"}))
        first = one.measure([asked])
        lengths = [EXAMPLES[i].tokens for i in (0, 1)]
        assert sorted(calls.shapes) == sorted([(1, 20)] * 3 + [(1, length) for length in lengths])
        calls.shapes.clear()
        assert one.measure([asked]) == first
        assert calls.shapes == []
        one.measure([replace(asked, windows=(0, 2, 5))])
        assert calls.shapes == [(1, 20)] * 2
        calls.remove()

    def test_does_not_differ_from_itself(self, prepared, windows):
        prunable = prepared("llama")
        (found,) = evaluator(prunable, windows).measure([Request(prunable.dense_units, (0, 1), needs=EVERYTHING)])
        assert found.kls == found.reverse_kls == (0.0, 0.0)
        assert found.accuracy is None, "there were no examples"

    def test_hidden_states_are_had_when_a_divergence_comes_late(self, prepared, windows):
        prunable = prepared("llama")
        one, cut = evaluator(prunable, windows), Request((1, 20) * 3, (0, 1, 2, 3), needs=frozenset({"kl"}))
        one.measure([Request(prunable.dense_units, (0, 1))])
        alone = measured_alone(prunable, cut, windows, tokens_per_batch=TOKENS_PER_BATCH)
        assert one.measure([cut]) == [alone]

    @pytest.mark.parametrize("needs", [frozenset(), frozenset({"kl"})])
    def test_a_loss_that_is_no_number_is_refused(self, needs, windows, prepared_llama):
        prunable = prepared_llama.prunable
        with torch.no_grad():
            prunable.model.get_output_embeddings().weight[0] = torch.nan
        one, asked = evaluator(prunable, windows), Request(prunable.dense_units, (0, 1), needs=needs)
        for _ in range(2):
            with pytest.raises(ModelError, match="dense model is not finite on 2 of 2 search windows") as raised:
                one.measure([asked, replace(asked, kept=(1, 20) * 3)])
            assert "model.dtype" in raised.value.hint


class TestSharing:
    def test_the_first_layers_run_once_for_all_that_keep_the_same_of_them(self, prepared, windows):
        prunable = prepared("llama")
        calls = layer_calls(prunable)
        text = (0, 1, 2)
        kept = [(2, 48, 1, 20, 2, 20), (2, 48, 1, 20, 2, 30), (2, 48, 1, 30, 2, 20), (2, 48, 1, 20, 2, 20)]
        evaluator(prunable, windows).measure([Request(k, text) for k in kept])
        assert calls.layers == [0, 1, 1, 2, 2, 2]
        calls.layers.clear()
        evaluator(prunable, windows).measure([Request(kept[0], text), Request(kept[1], (0, 1))])
        assert sorted(calls.layers) == [0, 0, 1, 1, 2, 2], "other text, or other batches, have nothing in common"
        assert set(calls.shapes) == {(3, 20), (2, 20)}, "batches are those of each request"
        calls.remove()

    def test_all_go_through_a_layer_before_any_goes_through_the_next(self, prepared, windows):
        prunable = prepared("llama")
        calls = layer_calls(prunable)
        needs = EVERYTHING - {"slopes"}
        evaluator(prunable, windows).measure([Request((1, 20 + i) * 3, (i, 4, 5), (0,), needs) for i in range(3)])
        assert calls.layers == sorted(calls.layers)
        calls.remove()


class TestAround:
    def test_says_how_far_it_is(self, prepared, windows):
        prunable, shares = prepared("llama"), []
        one = evaluator(prunable, windows)
        one.measure([Request((1, 20) * 3, (0, 1), (0,), EVERYTHING)], shares.append)
        # Every layer of the examples and the dense model, of the text, and its slopes; and the head of each batch.
        assert len(shares) > 3 + 3 + 1
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
        assert one.measure([], [].append) == []
        # After the last of three layers, the part of the head is left.
        assert evaluator(prunable, windows).measure([Request((1, 20) * 3, (0,))], (layers := []).append)
        assert layers[2] == pytest.approx(1 - head_share(prunable.model))

    @pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)])
    def test_the_callers_mode_changes_no_bit(self, mode, prepared, windows):
        asked, prunable = [Request((1, 20) * 3, (0, 1), (0,), EVERYTHING)], prepared("llama")
        with mode:
            found = evaluator(prunable, windows).measure(asked)
        assert [bits(e) for e in found] == [bits(e) for e in evaluator(prunable, windows).measure(asked)]

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_a_copy_measures_the_same(self, copied, prepared, windows):
        asked, one = [Request((1, 20) * 3, (0, 1))], evaluator(prepared("llama"), windows)
        assert [bits(e) for e in copied(one).measure(asked)] == [bits(e) for e in one.measure(asked)]

    @pytest.mark.parametrize("after", range(1, 13, 2))
    def test_the_model_is_dense_again_after_an_interrupt(self, after, prepared, windows):
        """Anywhere: in a layer, or at either end."""
        prunable = prepared("llama")
        one = evaluator(prunable, windows)
        asked = [Request((1, 20 + i) * 3, (0, 1), (0, 1), EVERYTHING) for i in range(2)]
        before = one.measure(asked)
        parameters = dict(prunable.model.named_parameters())
        modules, left = list(prunable.model.modules()), [after * 7]

        def interrupted(*_):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.measure(asked)
        handle.remove()
        assert list(prunable.model.modules()) == modules
        after_it = dict(prunable.model.named_parameters())
        assert after_it.keys() == parameters.keys()
        assert all(after_it[name] is parameter for name, parameter in parameters.items())
        assert [bits(e) for e in one.measure(asked)] == [bits(e) for e in before]


class layer_calls:  # noqa: N801 - read as a function
    """Which layers a model is asked for, and with batches of which shape when the first one is."""

    def __init__(self, prunable):
        self.layers, self.shapes = [], []
        self._handles = [
            layer.register_forward_pre_hook(self._note(index))
            for index, layer in enumerate(prunable.family.layers(prunable.model))
        ]

    def _note(self, index):
        def hook(_, args):
            self.layers.append(index)
            if index == 0:
                self.shapes.append(tuple(args[0].shape[:2]))

        return hook

    def remove(self):
        for handle in self._handles:
            handle.remove()
