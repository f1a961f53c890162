"""Running averages are the averages, however the inputs come in and however large their means are."""

from __future__ import annotations

import pytest
import torch

from ffgym.pruning.calibration import NestedRidge
from ffgym.pruning.statistics import BLOCK, InputMoments, Moments, require_finite

ALL = frozenset({"mean", "square", "second_moment"})


@pytest.fixture
def x():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 1


def averaged(*parts):
    moments = Moments(parts[0].shape[-1])
    for part in parts:
        moments.update(part)
    return moments.result()


def covariance(x):
    return torch.cov(x.double().T, correction=0)


def close(got, x, rtol=1e-5):
    """Entry by entry in units of the standard deviations: an error there is one of the correlation."""
    assert got.tokens == len(x)
    assert got.mean.dtype == torch.float64
    assert got.covariance.dtype == torch.float32
    deviation = x.double().std(0, correction=0)
    torch.testing.assert_close(got.mean / deviation, x.double().mean(0) / deviation, rtol=1e-9, atol=1e-5)
    scale = torch.outer(deviation, deviation)
    torch.testing.assert_close(got.covariance / scale, covariance(x) / scale, rtol=0, atol=rtol)


def test_are_the_averages_over_all_tokens(x):
    close(averaged(x), x)
    close(averaged(x[:7], x[7:20], x[20:].reshape(4, 10, 5)), x)
    close(averaged(*x.split(1)), x)


@pytest.mark.parametrize("channels", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_blocks_that_are_left_out_are_filled_in(channels):
    inputs = torch.randn(50, channels, generator=torch.Generator().manual_seed(0))
    close(averaged(inputs[:7], inputs[7:]), inputs)


def test_statistics_follow(x):
    got, exact = averaged(x[:7], x[7:]), x.double()
    stats = got.stats(ALL)
    assert stats.tokens == 60
    torch.testing.assert_close(stats.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.square, exact.square().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.variance, exact.var(0, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.second_moment, x.T @ x / 60)
    torch.testing.assert_close(got.moment(centred=False), exact.T @ exact / 60, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.moment(centred=True), covariance(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [frozenset(), {"mean"}, {"square"}, {"second_moment"}, {"mean", "square"}, ALL])
def test_only_what_is_named_is_there(x, names):
    stats = averaged(x).stats(frozenset(names) | {"gradient"})
    assert {name for name in ALL if getattr(stats, name) is not None} == set(names)


def test_half_precision_inputs_are_summed_in_full(x):
    got = averaged(*[x.bfloat16()] * 100)
    exact = x.bfloat16().double()
    torch.testing.assert_close(got.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    error = (got.covariance.double() - covariance(exact)).abs().max()
    assert error < 2**-8 * covariance(exact).diagonal().max(), "factors are rounded, and sums are not"


@pytest.mark.parametrize("ratio", [0, 100, 1000])
class TestLargeMeans:
    """Means that are ``ratio`` standard deviations, as in real models; two channels that are nearly one."""

    @pytest.fixture
    def inputs(self, ratio):
        generator = torch.Generator().manual_seed(ratio)
        x = torch.randn(4000, 6, generator=generator)
        x[:, 5] = x[:, 4] + 0.05 * x[:, 5]
        return x * torch.tensor([0.01, 1, 1, 30, 1, 1]) + ratio * torch.tensor([0.01, -1, 1, 30, 1, 1])

    def test_covariances_are_as_exact_as_without(self, inputs):
        close(averaged(*inputs.split(512)), inputs)

    def test_an_affine_refit_is_that_of_the_exact_moments(self, inputs):
        weight, mean = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), inputs.double().mean(0)
        got = averaged(*inputs.split(512))
        path = NestedRidge(weight, got.moment(centred=True), 1e-3, got.mean)
        exact = NestedRidge(weight, covariance(inputs), 1e-3, mean)
        for k in range(7):
            torch.testing.assert_close(path.weight_at(k), exact.weight_at(k), rtol=1e-3, atol=1e-3)

    def test_variances_and_second_moments_follow(self, inputs):
        stats, exact = averaged(*inputs.split(512)).stats(ALL), inputs.double()
        torch.testing.assert_close(stats.variance, exact.var(0, correction=0), rtol=1e-4, atol=0)
        torch.testing.assert_close(stats.second_moment.double(), exact.T @ exact / 4000, rtol=1e-5, atol=1e-4)


def test_a_result_is_of_the_tokens_so_far(x):
    moments = Moments(5)
    moments.update(x[:13])
    first = moments.result()
    moments.update(x[13:])
    close(first, x[:13])
    close(moments.result(), x)


def test_reorder_moves_channels(x):
    order = torch.tensor([2, 0, 1, 4, 3])
    got, wanted = averaged(x).reorder(order), averaged(x[:, order])
    torch.testing.assert_close(got.mean, wanted.mean)
    torch.testing.assert_close(got.covariance, wanted.covariance)


def test_reorder_keeps_rows_and_columns_together():
    moments = InputMoments(7, torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    got = moments.reorder(torch.tensor([1, 0]))
    assert got.tokens == 7
    assert got.mean.tolist() == [2, 1]
    assert got.covariance.tolist() == [[4, 3], [2, 1]]


def test_what_is_not_finite_is_named(x):
    from ffgym.errors import CalibrationError

    x[3, 2] = torch.inf
    require_finite(averaged(x[:3]))
    with pytest.raises(CalibrationError, match="the mean on the calibration text holds NaN or infinity"):
        require_finite(averaged(x[:3]), averaged(x))
