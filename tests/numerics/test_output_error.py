"""The error of sequential removal equals that of least squares, solved again for every set of regressors."""

import pytest
import torch
from torch import Tensor

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
from deploypipe.numerics.output_error import SequentialErrorRemoval


def random_rows(n: int, p: int, m: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(p, p, generator=generator, dtype=torch.float64)
    weights = torch.randn(p, m, generator=generator, dtype=torch.float64)
    return rows - rows.mean(0), weights, torch.rand(m, generator=generator, dtype=torch.float64)


def refitted_error(rows: Tensor, weights: Tensor, output_weights: Tensor, kept: list[int]) -> float:
    outputs = rows @ weights
    if kept:
        outputs = outputs - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], outputs).solution
    return float(outputs.square().mean(0) @ output_weights)


@pytest.mark.parametrize(("number", "size", "m", "seed"), [(12, 1, 5, 0), (12, 1, 20, 1), (4, 3, 4, 2), (80, 1, 3, 3)])
def test_losses_equal_refitted_least_squares_after_every_removal(number: int, size: int, m: int, seed: int) -> None:
    """Also over more removals than one panel holds, and with a regressor that belongs to no group."""
    p = number * size + 1
    rows, weights, output_weights = random_rows(4 * p, p, m, seed)
    groups = [list(range(i, i + size)) for i in range(1, p, size)]
    covariance = rows.T @ rows / len(rows)
    removal = SequentialErrorRemoval(covariance, weights, groups, output_weights=output_weights, ridge=0.0)
    left = list(range(number))
    while left:
        kept = [0, *(i for g in left for i in groups[g])]
        now = refitted_error(rows, weights, output_weights, kept)
        asked = left if number < 20 else left[:2]
        rests = [[i for i in kept if i not in groups[group]] for group in asked]
        expected = [refitted_error(rows, weights, output_weights, rest) - now for rest in rests]
        assert removal.losses(asked).tolist() == pytest.approx(expected, rel=1e-8)
        removal.remove_(left.pop(seed % len(left)))


def test_one_of_two_duplicates_costs_nothing_until_the_other_is_removed() -> None:
    rows, weights, output_weights = random_rows(50, 6, 4, 4)
    rows, weights = rows[:, [0, 1, 2, 3, 4, 5, 2]], weights[[0, 1, 2, 3, 4, 5, 2]]
    covariance = rows.T @ rows / len(rows)
    removal = SequentialErrorRemoval(covariance, weights, [[i] for i in range(7)], output_weights=output_weights)
    alone = refitted_error(rows, weights, output_weights, [0, 1, 3, 4, 5])
    assert float(removal.losses()[[2, 6]].max()) < 1e-4 * alone
    removal.remove_(6)
    assert float(removal.losses([2])) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_singular_covariances_give_finite_nonnegative_losses(rank: int) -> None:
    _, weights, output_weights = random_rows(20, 10, 3, 5)
    root = torch.randn(10, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    covariance = root @ root.T
    groups = [[i, i + 1] for i in range(0, 10, 2)]
    removal = SequentialErrorRemoval(covariance, weights, groups, output_weights=output_weights)
    for group in range(5):
        losses = removal.losses(range(group, 5))
        assert torch.isfinite(losses).all()
        assert (losses > -1e-6).all()
        removal.remove_(group)


def test_it_is_the_limit_of_information_for_a_large_noise_floor() -> None:
    """1/2 logdet(s^2 I + E) grows by tr(dE) / 2 s^2: the two scores rank alike if the noise floor is large."""
    rows, weights, _ = random_rows(40, 8, 3, 6)
    covariance = rows.T @ rows / len(rows)
    groups = [[i] for i in range(8)]
    error = SequentialErrorRemoval(covariance, weights, groups, output_weights=torch.ones(3).double())
    nats = SequentialRemoval(covariance, weights, groups, noise=1e5)
    floor = 1e5 * (weights.T @ covariance @ weights).diagonal().mean()
    for group in range(7):
        left = range(group, 8)
        torch.testing.assert_close(2 * floor * nats.losses(left), error.losses(left), rtol=1e-3, atol=1e-3)
        error.remove_(group)
        nats.remove_(group)


def test_stacked_problems_are_solved_independently() -> None:
    parts = [random_rows(300, 90, 4, seed) for seed in range(3)]
    covariances = [rows.T @ rows / len(rows) for rows, _, _ in parts]
    groups = [[i] for i in range(90)]
    together = SequentialErrorRemoval(
        torch.stack(covariances),
        torch.stack([weights for _, weights, _ in parts]),
        groups,
        output_weights=torch.stack([output_weights for _, _, output_weights in parts]),
    )
    alone = [
        SequentialErrorRemoval(covariance, weights, groups, output_weights=output_weights)
        for covariance, (_, weights, output_weights) in zip(covariances, parts, strict=True)
    ]
    for step in range(80):
        units = torch.tensor([step, 89 - step, (7 * step) % 90])
        together.remove_(units)
        for problem, unit in zip(alone, units.tolist(), strict=True):
            problem.remove_(unit)
    torch.testing.assert_close(together.losses(), torch.stack([problem.losses() for problem in alone]))
