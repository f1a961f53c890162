"""The refits against direct solves, against scikit-learn, and against the definition of what they minimise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from ffgym.errors import CalibrationError
from ffgym.pruning.calibration import (
    RIDGE_GRID,
    NestedRidge,
    PlainPath,
    cholesky_,
    pick_ridge,
    sketch,
)
from ffgym.pruning.factors import factor_bytes

TOKENS = 200


class Problem:
    """A consumer W (m x n) with a bias, correlated inputs x with a mean, and a lambda."""

    def __init__(self, channels, outputs, ridge, seed, affine):
        generator = torch.Generator().manual_seed(seed)
        self.n, self.ridge, self.affine = channels, ridge, affine
        mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        self.x = torch.randn(TOKENS, channels, generator=generator, dtype=torch.float64) @ mix + 0.7
        self.W = torch.randn(outputs, channels, generator=generator).double()  # float32 values
        self.bias = torch.randn(outputs, generator=generator) if affine else None
        self.G = self.x.T @ self.x / TOKENS
        self.mean = self.x.mean(0) if affine else None
        self.moment = self.G - torch.outer(self.mean, self.mean) if affine else self.G
        self.l = ridge * self.moment.diagonal().mean()

    def path(self):
        return NestedRidge(self.W.float(), self.moment.clone(), self.ridge, self.mean, self.bias)

    def solved(self, k):
        """The normal equations, W_K + W_P G_PK (G_KK + l I)^-1."""
        G = self.moment
        A = G[:k, :k] + self.l * torch.eye(k, dtype=torch.float64)
        return self.W[:, :k] + torch.linalg.solve(A, (self.W[:, k:] @ G[k:, :k]).T).T

    def close(self, got, wanted):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=2e-5 * float(self.W.norm()))


problems = st.builds(
    Problem,
    channels=st.integers(1, 12),
    outputs=st.integers(1, 5),
    ridge=st.sampled_from([1e-3, 1e-2, 1e-1, 1.0, 10.0]),
    seed=st.integers(0, 10_000),
    affine=st.booleans(),
)


class TestNestedRidge:
    @given(problems)
    def test_equals_the_direct_solve_at_every_level(self, problem):
        path = problem.path()
        for k in range(problem.n + 1):
            assert path.weight_at(k).shape == (len(problem.W), k)
            problem.close(path.weight_at(k), problem.solved(k))

    @given(problems)
    def test_equals_scikit_learn_at_every_level(self, problem):
        """Ridge shrinks towards 0, we towards W_K: so it is asked for the difference, W' - W_K, that makes up for x_P.

        Its objective is a sum over tokens, ours a mean: alpha = tokens * l. Its intercept is not shrunk; nor is ours.
        """
        path = problem.path()
        for k in range(1, problem.n + 1):
            ridge = Ridge(alpha=TOKENS * float(problem.l), fit_intercept=problem.affine, solver="cholesky")
            ridge.fit(problem.x[:, :k].numpy(), (problem.x[:, k:] @ problem.W[:, k:].T).numpy())
            change = torch.from_numpy(ridge.coef_).reshape(len(problem.W), k)
            problem.close(path.weight_at(k), problem.W[:, :k] + change)
            if problem.affine:
                intercept = torch.as_tensor(ridge.intercept_).reshape(-1)
                problem.close(path.bias_at(k), problem.bias.double() + intercept)
            else:
                assert path.bias_at(k) is None

    @given(problems)
    def test_removal_error_is_the_minimum(self, problem):
        """E||(W - W') x||^2 + l ||W - W'||^2, where a channel that is gone counts as a weight of 0 in W'."""
        path = problem.path()
        assert path.removal_error.shape == (problem.n + 1,)
        assert (path.removal_error.diff() <= 1e-9).all()
        for k in range(problem.n + 1):
            change = problem.W.clone()
            change[:, :k] -= problem.solved(k)
            value = ((change @ problem.moment) * change).sum() + problem.l * change.square().sum()
            torch.testing.assert_close(path.removal_error[k], value, rtol=1e-6, atol=1e-6)

    @given(problems, st.integers(0, 100), st.data())
    def test_slopes_are_what_a_linear_loss_changes_by_from_level_to_level(self, problem, seed, data):
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(problem.W.shape, generator=generator)
        of_bias = torch.randn(len(problem.W), generator=generator) if problem.affine else None
        for path in (problem.path(), PlainPath(problem.W.float(), problem.bias)):

            def loss(k, path=path):
                value = (path.weight_at(k).double() * gradient[:, :k].double()).sum()
                return value if of_bias is None else value + path.bias_at(k).double() @ of_bias.double()

            start = data.draw(st.integers(0, problem.n - 1))
            end = data.draw(st.integers(start + 1, problem.n))
            wanted = torch.stack([loss(k + 1) - loss(k) for k in range(start, end)])
            scale = float(problem.W.norm() * gradient.norm())
            got = path.slopes(gradient, of_bias, start, end).double()
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * scale)

    @given(problems)
    def test_keeping_everything_is_the_dense_consumer(self, problem):
        path = problem.path()
        assert torch.equal(path.weight_at(problem.n), problem.W.float())
        if problem.affine:
            assert torch.equal(path.bias_at(problem.n), problem.bias)

    def test_a_large_lambda_in_the_affine_form_tends_to_flaps_bias(self):
        """W' = W_K and b' = b + W_P mu_P (arXiv 2312.11983)."""
        problem = Problem(8, 3, 1e7, seed=0, affine=True)
        wanted = problem.bias.double() + problem.W[:, 5:] @ problem.mean[5:]
        torch.testing.assert_close(problem.path().bias_at(5).double(), wanted, rtol=1e-4, atol=1e-4)

    def test_the_affine_form_starts_a_bias_where_there_is_none(self):
        problem = Problem(8, 3, 0.1, seed=0, affine=True)
        path = NestedRidge(problem.W.float(), problem.moment.clone(), problem.ridge, problem.mean, None)
        problem.close(path.bias_at(5), problem.path().bias_at(5) - problem.bias)
        problem.close(path.bias_at(0), problem.W @ problem.mean)

    @pytest.mark.parametrize("shift", [0.0, 1e3])
    def test_the_bias_is_the_direct_formula_however_large_the_mean(self, shift):
        """b' = b + W mu - W'_K mu_K in float64: in float32 its two products would cancel."""
        problem = Problem(12, 3, 0.1, seed=3, affine=True)
        mean = problem.mean + shift
        path = NestedRidge(problem.W.float(), problem.moment.clone(), problem.ridge, mean, problem.bias)
        for k in range(13):
            wanted = problem.bias + problem.W @ mean - problem.solved(k) @ mean[:k]
            atol = 1e-6 * float(wanted.norm() + 1)
            torch.testing.assert_close(path.bias_at(k).double(), wanted, rtol=1e-6, atol=atol)

    def test_without_a_mean_the_bias_stays(self):
        problem = Problem(8, 3, 0.1, seed=1, affine=False)
        bias = torch.randn(3)
        assert torch.equal(NestedRidge(problem.W.float(), problem.moment.clone(), 0.1, None, bias).bias_at(4), bias)

    def test_loss_increase_is_the_second_order_term(self):
        """1/2 E[e^T F e] for the output error e = (W - W') x, plus the ridge's own share."""
        problem = Problem(8, 4, 0.1, seed=2, affine=False)
        root = torch.randn(4, 4, dtype=torch.float64)
        fisher = root @ root.T
        got = problem.path().loss_increase(fisher)
        moment = problem.moment + problem.l * torch.eye(8, dtype=torch.float64)
        for k in range(9):
            change = problem.W.clone()
            change[:, :k] -= problem.solved(k)
            torch.testing.assert_close(
                got[k], 0.5 * torch.trace(fisher @ change @ moment @ change.T), rtol=1e-4, atol=1e-4
            )

    def test_memory_is_the_two_factors(self):
        factors = Problem(8, 3, 0.1, 0, affine=False).path().factors
        held = sum(factor.nbytes for factor in (factors["projected"], factors["inverse"]))
        assert held == factor_bytes(3, 8) == 4 * (3 * 8 + 8 * 8)


class TestFactors:
    def test_inputs_that_are_always_zero_are_no_obstacle(self):
        path = NestedRidge(torch.ones(2, 4), torch.zeros(4, 4), 0.01)
        assert all(torch.isfinite(path.weight_at(k)).all() for k in range(5))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_moments_that_are_not_finite_are_refused(self, bad):
        moment = torch.eye(3, dtype=torch.float64)
        moment[1, 1] = bad
        with pytest.raises(CalibrationError, match="NaN or infinity") as raised:
            cholesky_(moment, 0.01)
        assert "dtype" in raised.value.hint

    def test_moments_that_are_not_positive_definite_are_refused(self):
        with pytest.raises(CalibrationError, match=r"3 channels\) with ridge 0.01") as raised:
            cholesky_(torch.diag(torch.tensor([5.0, 5.0, -1.0], dtype=torch.float64)), 0.01)
        assert "prune.ridge" in raised.value.hint

    def test_plain_path_is_the_prefix_itself(self):
        weight, bias = torch.randn(2, 5), torch.randn(2)
        assert PlainPath(weight).weight_at(3).data_ptr() == weight.data_ptr()
        assert torch.equal(PlainPath(weight).weight_at(3), weight[:, :3])
        assert PlainPath(weight, bias).bias_at(3) is bias
        assert PlainPath(weight).bias_at(3) is None


def errors_by_moment(weight, moment, held_out, kept, ridge):
    """tr(E M E^T) for the change E of the whole weight and the held-out inputs' sum M of x x^T, in float64."""
    change = weight.double().clone()
    A = moment[:kept, :kept] + ridge * moment.diagonal().mean() * torch.eye(kept, dtype=torch.float64)
    change[:, :kept] = -torch.linalg.solve(A, moment[:kept, kept:] @ change[:, kept:].T).T
    return float(((change @ (held_out.T @ held_out)) * change).sum())


@st.composite
def held_out_problems(draw):
    """A weight, inputs to fit and inputs held out, with a mean; few to fit want a strong ridge."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n = draw(st.integers(2, 20))
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    shift = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    fit, held_out = (
        torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix + shift
        for tokens in (draw(st.integers(n // 2 + 1, 4 * n)), 100)
    )
    return torch.randn(draw(st.integers(1, 6)), n, generator=generator), fit, held_out


class TestPickRidge:
    @given(held_out_problems(), st.booleans())
    def test_no_neighbour_has_less_held_out_error(self, problem, affine):
        """As the held-out inputs' n x n moment tells it: geometric mean where 3/4 and 1/2 of the channels are kept."""
        W, fit, held_out = problem
        n, mean = fit.shape[1], fit.mean(0) if affine else None
        moment = torch.cov(fit.T, correction=0) if affine else fit.T @ fit / len(fit)
        centred = held_out - mean if affine else held_out
        kept = [min(max(round(level * n), 1), n) for level in (0.75, 0.5)]
        errors = np.array([[errors_by_moment(W, moment, centred, k, ridge) for k in kept] for ridge in RIDGE_GRID])
        wanted = np.log(errors.clip(1e-30)).sum(axis=1)
        at = RIDGE_GRID.index(pick_ridge(W, moment, held_out, mean))
        assert wanted[at] <= wanted[max(0, at - 1) : at + 2].min() + 2e-3

    def test_random_sums_of_many_outputs_choose_what_all_of_them_would(self):
        generator = torch.Generator().manual_seed(0)
        W, x = torch.randn(400, 40, generator=generator), torch.randn(90, 40, generator=generator)
        x = x @ torch.randn(40, 40, generator=generator)
        fit, held_out = x[:60], x[60:]
        moment = fit.T @ fit / 60
        assert len(sketch(W)) == 128
        got = pick_ridge(W, moment, held_out)
        assert got == pick_ridge(torch.linalg.cholesky(W.T @ W).T, moment, held_out), "the same errors in 40 outputs"

    def test_the_affine_form_counts_what_its_bias_does_not_carry(self):
        """The bias carries the mean of the fitted inputs: held-out inputs that lie elsewhere are not centred again."""
        W, moment = torch.ones(1, 2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        inputs = torch.tensor([[5.0, 3.0], [6.0, 2.0]])
        got = pick_ridge(W, moment, inputs, torch.tensor([5.0, 3.0]))
        assert got == pick_ridge(W, moment, inputs - torch.tensor([5.0, 3.0]))

    def test_noise_wants_a_strong_ridge_and_plenty_of_data_a_weak_one(self):
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(4, 12, generator=generator)
        noise = torch.randn(13, 12, generator=generator)
        assert pick_ridge(W, noise.T @ noise / 13, torch.eye(12)) == max(RIDGE_GRID)
        mix = torch.randn(12, 12, generator=generator)
        assert pick_ridge(W, mix.T @ mix, mix) == min(RIDGE_GRID)

    def test_a_ridge_that_leaves_the_moment_indefinite_is_passed_over(self):
        weight, held_out = torch.ones(1, 4), torch.eye(4)
        moment = torch.diag(torch.tensor([-0.002, 1.0, 1.0, 1.0]))  # as sums in float32 may leave it
        with pytest.raises(CalibrationError):
            pick_ridge(weight, moment, held_out, grid=(1e-4, 1e-3))
        assert pick_ridge(weight, moment, held_out, grid=(1e-3, 1e-2, 1e-1)) >= 1e-2

    def test_float64_serves_where_float32_leaves_the_moment_indefinite(self):
        moment = torch.ones(30, 30, dtype=torch.float64)
        with pytest.raises(CalibrationError):
            cholesky_(moment.float().clone(), 1e-9)
        assert pick_ridge(torch.ones(1, 30), moment, torch.ones(2, 30), grid=(1e-9,)) == 1e-9

    def test_half_precision_inputs_of_a_half_precision_weight(self):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
        got = pick_ridge(torch.ones(2, 6).bfloat16(), x.double().T @ x.double(), x)
        assert got == pick_ridge(torch.ones(2, 6), x.double().T @ x.double(), x.float())
