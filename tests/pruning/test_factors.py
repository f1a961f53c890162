"""How factors are kept, and that refits from them are those of a direct solve, whatever was asked before."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffgym.errors import CalibrationError
from ffgym.pruning.calibration import NestedRidge, cholesky_, scale
from ffgym.pruning.factors import (
    WIDE,
    factor_bytes,
    factor_dtype,
    grid,
    inverse_,
    packed,
    products_in,
    times_lower,
    unpacked,
)


def lower(n, dtype=torch.float64):
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    return cholesky_(x.T @ x / n, 0.01)


class TestTriangle:
    @given(st.integers(1, 700), st.data())
    def test_rows_come_back(self, n, data):
        triangle = torch.randn(n, n).tril()
        start = data.draw(st.integers(0, n - 1))
        end = data.draw(st.integers(start + 1, n))
        blocks = packed(triangle, torch.float32)
        assert torch.equal(unpacked(blocks, n, start, end), triangle[start:end, :end])

    def test_takes_half_the_bytes(self):
        assert factor_bytes(0, 14336) < 1.01 * 14336**2
        assert factor_dtype(WIDE) is torch.float32
        assert factor_dtype(WIDE + 1) is torch.bfloat16

    def test_wide_factors_are_made_in_the_memory_of_the_moment(self):
        n = WIDE + 100
        x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0))
        moment = x.T @ x / n
        A = moment.double() + 0.01 * scale(moment) * torch.eye(n)
        C = cholesky_(moment, 0.01)
        assert C.data_ptr() == moment.data_ptr()
        assert torch.equal(C, C.tril())
        torch.testing.assert_close(C.double() @ C.double().T, A, rtol=1e-4, atol=1e-5)
        weight = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(times_lower(weight, C), weight @ C, rtol=1e-4, atol=1e-4)

    def test_a_wide_moment_that_is_not_positive_definite_is_refused(self):
        moment = torch.eye(WIDE + 100)
        moment[WIDE, WIDE] = -1
        with pytest.raises(CalibrationError, match="not positive definite"):
            cholesky_(moment, 0.01)

    @pytest.mark.parametrize("n", [1, 511, 512, 1100])
    def test_inverse(self, n):
        C = lower(n)
        torch.testing.assert_close(inverse_(C.clone()) @ C, torch.eye(n, dtype=torch.float64))

    def test_the_grid_lies_on_blocks_and_is_fine_enough(self):
        assert list(grid(128)) == []
        assert list(grid(300)) == [256, 128]
        assert list(grid(14336))[:2] == [13440, 12544]
        assert len(grid(28672)) == 15


class TestProducts:
    def test_bfloat16_models_multiply_rounded_numbers_and_sum_in_float32(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 300, generator=generator), torch.randn(300, 64, generator=generator)
        exact, rounded = x @ y, x.bfloat16().float() @ y.bfloat16().float()
        with products_in(torch.bfloat16):
            got = x @ y
        assert min((got - exact).abs().max(), (got - rounded).abs().max()) < 1e-4, "units for bfloat16, or none"
        with products_in(torch.float32):
            assert torch.equal(x @ y, exact)

    def test_what_was_set_before_is_set_again(self):
        before = torch.backends.mkldnn.matmul.fp32_precision
        with pytest.raises(KeyError), products_in(torch.bfloat16):
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == before


@cache
def wide_problem(dtype=torch.float32, *, affine=False):
    """Inputs whose spectrum falls by a factor of a thousand, with a mean."""
    m, n, generator = 24, WIDE + 100, torch.Generator().manual_seed(0)
    x = torch.randn(n + 500, n, generator=generator) * torch.logspace(0, -1.5, n)
    x = x + 0.3 * torch.randn(n + 500, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    moment = x.T @ x / len(x)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    mean = torch.randn(n, generator=generator) if affine else None
    return weight, moment, NestedRidge(weight, moment.clone(), 0.01, mean)


def solved(weight, moment, k):
    W, G = weight.double(), moment.double()
    A = G[:k, :k] + 0.01 * scale(G) * torch.eye(k, dtype=torch.float64)
    return W[:, :k] + torch.linalg.solve(A, (W[:, k:] @ G[k:, :k]).T).T


def output_error(weight, moment, change_at):
    change = weight.double().clone()
    change[:, : change_at.shape[1]] -= change_at.double()
    return float(((change @ moment.double()) * change).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_consumers_refits_are_as_good_as_the_direct_solves(dtype):
    """Factors in bfloat16 add less output error than rounding the exact refit to bfloat16."""
    weight, moment, path = wide_problem(dtype)
    for k, got in path.weights_at([2100, 1111]):
        wanted = solved(weight, moment, k)
        assert (got - wanted).norm() < 2e-3 * wanted.norm()
        least = output_error(weight, moment, wanted)
        added, by_rounding = (output_error(weight, moment, each) - least for each in (got, wanted.bfloat16()))
        assert added < 0.5 * by_rounding
        assert least < 0.1 * output_error(weight, moment, weight[:, :k]), "and they are worth it"


@settings(max_examples=12)
@given(st.lists(st.integers(0, WIDE + 100), min_size=1, max_size=4), st.integers(0, WIDE + 100))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_level_has_the_same_bits_whatever_is_asked_with_it_or_before(dtype, others, level):
    path = wide_problem(dtype)[2]
    alone = path.weight_at(level)
    assert alone.shape == (24, level)
    swept = dict(path.weights_at([*others, level]))
    assert list(swept) == sorted({*others, level}, reverse=True)
    assert torch.equal(swept[level], alone)
    assert torch.equal(path.weight_at(level), alone)


@pytest.mark.parametrize("affine", [False, True])
def test_restored_factors_give_the_same_bits(affine):
    weight, _, path = wide_problem(torch.bfloat16, affine=affine)
    again = NestedRidge.restored(weight, path.factors, None)
    for k in (0, 700, 2100):
        assert torch.equal(again.weight_at(k), path.weight_at(k))
        assert (again.bias_at(k) is None) == (not affine)
        if affine:
            assert torch.equal(again.bias_at(k), path.bias_at(k))
    held = [sum(each.factors[name].nbytes for name in ("projected", "inverse")) for each in (again, path)]
    assert held == [factor_bytes(*weight.shape)] * 2


def test_slopes_of_a_wide_consumer_are_its_steps():
    weight, _, path = wide_problem()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    slopes = path.slopes(gradient, None, 100, 2048)
    for k in (100, 2047):
        steps = dict(path.weights_at([k, k + 1]))
        wanted = float((steps[k + 1] * gradient[:, : k + 1]).sum() - (steps[k] * gradient[:, :k]).sum())
        assert float(slopes[k - 100]) == pytest.approx(wanted, rel=0.05, abs=0.05)
