"""CKA equals the hand-computed unbiased HSIC, and is unbiased, unlike plain CKA."""

import pytest
import torch
from torch import Tensor

from deploypipe.numerics.cka import HsicAccumulator, cka, gram_of


def hsic_by_hand(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, over explicit kernel matrices with empty diagonals."""
    n = len(x)
    k, kk = x @ x.T, y @ y.T
    for i in range(n):
        k[i, i] = kk[i, i] = 0
    first = torch.trace(k @ kk)
    second = k.sum() * kk.sum() / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (k @ kk).sum()
    return float((first + second - third) / (n * (n - 3)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_of(*representations: Tensor) -> Tensor:
    accumulator = HsicAccumulator(len(representations))
    accumulator.add_([gram_of(rows) for rows in representations])
    return cka(accumulator.total)


def test_cka_equals_hand_computed_hsic_summed_over_batches() -> None:
    x, y = normal(30, 5, seed=0), normal(30, 7, seed=1)
    y[:, 0] += x[:, 0]
    accumulator = HsicAccumulator(2)
    terms = torch.zeros(3, dtype=torch.float64)
    for rows in (slice(0, 12), slice(12, 27), slice(27, 30)):  # three samples say nothing
        accumulator.add_([gram_of(x[rows]), gram_of(y[rows])])
        if rows.stop < 30:
            pairs = ((x, y), (x, x), (y, y))
            terms += torch.tensor([hsic_by_hand(a[rows], b[rows]) for a, b in pairs], dtype=torch.float64)
    assert float(cka(accumulator.total)[0, 1]) == pytest.approx(
        float(terms[0] / (terms[1] * terms[2]).sqrt()), rel=1e-9
    )


def test_independent_wide_representations_are_unrelated_on_average() -> None:
    values = [float(cka_of(normal(32, 1024, seed=2 * s), normal(32, 1024, seed=2 * s + 1))[0, 1]) for s in range(20)]
    assert abs(sum(values) / len(values)) < 0.05  # the biased estimate is above 0.9


def test_cka_of_rotated_scaled_and_shifted_copies_is_one() -> None:
    x, y = normal(24, 6, seed=3), normal(24, 6, seed=4) + normal(24, 6, seed=3)
    rotation = torch.linalg.qr(normal(6, 6, seed=5)).Q
    result = cka_of(x, y, 3.0 * x @ rotation, y + 5.0)
    torch.testing.assert_close(result.diagonal(), torch.ones(4, dtype=torch.float64))
    assert float(result[0, 2]) == pytest.approx(1.0)
    assert float(result[2, 3]) == pytest.approx(float(result[0, 1]))


def test_large_means_cost_no_digits() -> None:
    x, y = normal(24, 6, seed=6).float(), (normal(24, 6, seed=6) + normal(24, 6, seed=7)).float()
    assert float(cka_of(x + 1000, y)[0, 1]) == pytest.approx(float(cka_of(x, y)[0, 1]), abs=1e-3)


def test_constant_representation_gives_zero() -> None:
    result = cka_of(torch.ones(10, 3), normal(10, 3, seed=8).float())
    assert result[0].tolist() == [0.0, 0.0]
