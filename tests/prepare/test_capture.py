"""Statistics are those of inputs and gradients that really occur, from one walk, and no hook is left behind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES

from ffgym.models.cut import PrunableModel
from ffgym.prepare.statistics import PIECE_TOKENS, gradient_statistics, stream_statistics
from ffgym.pruning.statistics import Moments
from ffgym.testing.models import tiny_model

FIRST_ORDER = frozenset({"gradient", "output_gradient"})


@pytest.fixture(params=DISTINCT_FAMILIES)
def prunable(request):
    return PrunableModel(tiny_model(request.param))


@pytest.fixture
def llama():
    return PrunableModel(tiny_model("llama"))


@pytest.fixture(scope="module")
def windows(random_windows):
    return random_windows(6, 16)


def consumers(prunable):
    return [half.consumer for half in prunable.halves]


def recorded(prunable, windows):
    """Inputs of every consumer over all windows, shape (tokens, n) each, one window at a time."""
    inputs = [[] for _ in consumers(prunable)]
    handles = [
        consumer.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].reshape(-1, args[0].shape[-1])))
        for consumer, to in zip(consumers(prunable), inputs, strict=True)
    ]
    with torch.no_grad():
        for window in windows:
            prunable.model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in inputs]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def collected(prunable, windows, **options):
    return list(stream_statistics(prunable, windows, **options))


def test_held_out_windows_are_the_last_and_kept_apart(prunable, windows):
    fitted, apart = recorded(prunable, windows[:4]), recorded(prunable, windows[4:])
    for (_, sums, held_out), x, y in zip(collected(prunable, windows, held_out=2), fitted, apart, strict=True):
        got = sums.result()
        assert got.tokens == len(x)
        torch.testing.assert_close(got.mean.float(), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held_out, y, rtol=1e-4, atol=1e-5)


def test_have_the_bits_of_ordinary_calls(prunable, windows):
    sums = [Moments(consumer.in_features) for consumer in consumers(prunable)]
    handles = [
        consumer.register_forward_pre_hook(lambda _, args, to=to: to.update(args[0]))
        for consumer, to in zip(consumers(prunable), sums, strict=True)
    ]
    with torch.no_grad():
        for batch in windows.split(2):
            prunable.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    got = collected(prunable, windows, tokens_per_batch=32)
    for expected, (index, stats, held_out), wanted in zip(range(6), got, sums, strict=True):
        assert (index, held_out) == (expected, None), "no room is taken for what is not measured"
        equal(stats.result(), wanted.result())


def equal(got, wanted):
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(got, name), value) if torch.is_tensor(value) else getattr(got, name) == value


def test_units_may_be_permuted_as_soon_as_their_statistics_are_there(prunable, windows):
    wanted = collected(prunable, windows, held_out=2)
    stream = stream_statistics(prunable, windows, held_out=2)
    for (index, fitted, apart), (_, first, second) in zip(stream, wanted, strict=True):
        equal(fitted.result(), first.result())
        assert torch.equal(apart, second)
        half = prunable.halves[index]
        half.permute(torch.arange(half.sublayer.units).flip(0))


def test_every_layer_is_run_once_a_batch(llama, windows):
    calls = Counter()
    for index, layer in enumerate(llama.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    collected(llama, windows, held_out=2, tokens_per_batch=32)
    assert calls == {0: 3, 1: 3, 2: 3}


def test_where_no_gradient_is_needed_nothing_runs(llama, windows):
    llama.model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    needs = frozenset({"mean", "second_moment"})
    assert list(gradient_statistics(llama, windows, needs)) == []


def gradients_of(prunable, windows, needs=FIRST_ORDER):
    """In order of depth; the walk goes from the last layer to the first."""
    found = list(gradient_statistics(prunable, windows, needs))
    assert [index for index, _ in found] == list(reversed(range(len(found))))
    return [stats for _, stats in reversed(found)]


def test_gradients_of_long_windows_are_those_of_their_pieces(llama, random_windows):
    windows = random_windows(2, 2 * PIECE_TOKENS + 50)
    pieces = windows[:, : 2 * PIECE_TOKENS].reshape(-1, PIECE_TOKENS)
    for stats, piecewise in zip(gradients_of(llama, windows), gradients_of(llama, pieces), strict=True):
        assert stats.tokens == piecewise.tokens == 4 * (PIECE_TOKENS - 1)
        assert torch.equal(stats.gradient, piecewise.gradient)
        assert torch.equal(stats.output_gradient, piecewise.output_gradient)


def test_gradients_have_the_bits_of_a_backward_pass_through_the_model(prunable, windows):
    seen = {}
    for index, consumer in enumerate(consumers(prunable)):
        consumer.register_forward_hook(lambda _, args, output, index=index: seen.update({index: (args[0], output)}))
    sums = [[torch.zeros_like(c.weight), torch.zeros(c.out_features, c.out_features)] for c in consumers(prunable)]
    for window in windows.split(1):
        loss = prunable.model(input_ids=window, labels=window, use_cache=False).loss * 15
        gradients = torch.autograd.grad(loss, [seen[index][1] for index in range(6)])
        for index, gradient in enumerate(gradients):
            g = gradient.flatten(0, -2)
            sums[index][0].data.addmm_(g.T, seen[index][0].detach().flatten(0, -2))
            sums[index][1].addmm_(g.T, g)
    got = gradients_of(prunable, windows)
    for stats, (weight, fisher) in zip(got, sums, strict=True):
        assert torch.equal(stats.gradient, weight / 90)
        assert torch.equal(stats.output_gradient, fisher / 90)


def test_gradients_are_the_same_where_parameters_are_frozen(llama, windows):
    wanted = gradients_of(llama, windows)
    llama.model.requires_grad_(False)
    got = gradients_of(llama, windows)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.gradient, b.gradient)
        assert a.output_gradient is not None
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def test_only_the_gradients_that_are_needed(llama, windows):
    got = gradients_of(llama, windows, frozenset({"gradient"}))[0]
    assert got.gradient is not None
    assert got.output_gradient is None


@pytest.mark.parametrize("collect", [collected, gradients_of])
def test_no_hook_is_left_behind(llama, windows, collect):
    before = hooks(llama.model)
    collect(llama, windows)
    assert hooks(llama.model) == before

    def broken(*_):
        raise RuntimeError("out of memory")

    llama.model.model.layers[1].register_forward_pre_hook(broken)
    before = hooks(llama.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(llama, windows)
    assert hooks(llama.model) == before


def test_the_model_is_left_as_it_was(llama, windows):
    with torch.no_grad():
        before = llama.model(input_ids=windows).logits
    collected(llama, windows)
    gradients_of(llama, windows)
    with torch.no_grad():
        assert torch.equal(llama.model(input_ids=windows).logits, before)
