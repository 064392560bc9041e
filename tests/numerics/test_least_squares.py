"""Regressions from moments equal those from the data."""

import numpy as np
import pytest
import torch
from torch import Tensor

from deploypipe.numerics.least_squares import (
    CrossMoments,
    GramSum,
    regular_cholesky,
    solve_towards,
    sum_of_products,
)


def data(seed: int = 0, n: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) + 2
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64) + 1
    return x, y + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)


def test_ridge_equals_its_closed_form() -> None:
    x, y = data()
    prior = torch.ones(5, 3, dtype=torch.float64)
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    penalty = 0.1 * float(gram.diagonal().mean())
    stacked = torch.cat([x / len(x) ** 0.5, penalty**0.5 * torch.eye(5, dtype=torch.float64)])
    targets = torch.cat([y / len(x) ** 0.5, penalty**0.5 * prior])
    expected = np.linalg.lstsq(stacked.numpy(), targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose(solve_towards(gram, cross, prior, 0.1).numpy(), expected, atol=1e-10)


def test_the_prior_stays_where_data_has_no_information() -> None:
    prior = torch.randn(4, 2, dtype=torch.float64)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(solve_towards(zeros, torch.zeros(4, 2, dtype=torch.float64), prior, 1e-3), prior)
    gram = zeros.clone()
    gram[0, 0] = 1.0
    cross = torch.zeros(4, 2, dtype=torch.float64)
    cross[0] = 5.0
    solution = solve_towards(gram, cross, prior, 1e-6)
    torch.testing.assert_close(solution[1:], prior[1:])
    torch.testing.assert_close(solution[0], torch.full((2,), 5.0, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("has_intercept", [True, False])
def test_fit_equals_lstsq_and_reports_its_product_moments(has_intercept: bool) -> None:
    x, y = data()
    prior = torch.zeros(5, 3, dtype=torch.float64)
    fit = CrossMoments.of(x, y).fit(prior, 1e-12, has_intercept=has_intercept)
    regressors = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) if has_intercept else x
    expected = np.linalg.lstsq(regressors.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.coefficients.numpy(), expected[:5], atol=1e-8)
    np.testing.assert_allclose(fit.intercept.numpy(), expected[5] if has_intercept else np.zeros(3), atol=1e-8)
    product = x @ fit.coefficients
    torch.testing.assert_close(fit.product_mean, product.mean(0))
    torch.testing.assert_close(fit.product_variance, product.var(0, unbiased=False))


@pytest.mark.parametrize("has_intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 10.0])
def test_stacked_problems_are_solved_independently(ridge: float, has_intercept: bool) -> None:
    x, y = data(1)
    prior = torch.ones(5, 3, dtype=torch.float64)
    fit = CrossMoments.of(x, y).fit(prior, ridge, has_intercept=has_intercept)
    other_x, other_y = data(2)
    both = CrossMoments.of(torch.stack([x, other_x]), torch.stack([y, other_y]))
    fits = both.fit(prior.expand(2, -1, -1), ridge, has_intercept=has_intercept)
    for name in ("coefficients", "intercept", "product_mean", "product_variance"):
        torch.testing.assert_close(getattr(fits, name)[0], getattr(fit, name))


def test_chunked_products_in_float32_are_close_to_float64() -> None:
    x = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(2))
    y = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(3))
    expected = x.double().T @ y.double()
    torch.testing.assert_close(sum_of_products(x, y), expected, atol=1e-2, rtol=1e-5)


def test_indefinite_moments_are_solved_and_nan_is_an_error() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, -1e-6], dtype=torch.float64))
    factor = regular_cholesky(gram, 1e-9)
    torch.testing.assert_close(factor @ factor.T, gram, atol=1e-4, rtol=0)
    with pytest.raises(torch.linalg.LinAlgError):
        regular_cholesky(gram * float("nan"), 1e-9)


@pytest.mark.parametrize("width", [1, 191, 192, 500])
def test_gram_of_parts_is_the_gram(width: int) -> None:
    x = torch.randn(5000, width, generator=torch.Generator().manual_seed(0))  # more than are added in float32
    one, many = GramSum(), GramSum()
    one.add_(x)
    for part in torch.split(x, 700):
        many.add_(part)
    expected = x.double().T @ x.double()
    for total in (one.total(), many.total()):
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, total.T, rtol=0, atol=0)
        assert float((total - expected).norm() / expected.norm()) < 1e-6


def test_grams_of_stacked_rows_are_independent() -> None:
    x = torch.randn(3, 40, 130, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stacked = GramSum()
    stacked.add_(x)
    torch.testing.assert_close(stacked.total(), x.mT @ x)
