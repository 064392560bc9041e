"""Information between blocks of columns: definition, data processing inequality, and enough rows."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from deploypipe.numerics.gaussian_information import gaussian_information, principal_rows, redundancy


def covariance(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size + 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


@pytest.mark.parametrize(("num_x", "num_y", "floor", "seed"), [(1, 1, 0.0, 0), (6, 4, 0.0, 1), (3, 9, 0.2, 2)])
def test_equals_the_definition(num_x: int, num_y: int, floor: float, seed: int) -> None:
    joint = covariance(num_x + num_y, seed)
    noisy = joint.clone()
    noisy.diagonal()[num_x:] += floor
    expected = 0.5 * (
        torch.linalg.slogdet(noisy[:num_x, :num_x]).logabsdet
        + torch.linalg.slogdet(noisy[num_x:, num_x:]).logabsdet
        - torch.linalg.slogdet(noisy).logabsdet
    )
    assert gaussian_information(joint, num_x, floor=floor) == pytest.approx(float(expected), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_has_no_more_information_than_any_member(seed: int) -> None:
    """The data processing inequality, on the exact covariance of a linear Gaussian chain of residual steps."""
    generator = torch.Generator().manual_seed(seed)
    d, steps = 4, 4
    # The whole chain as a linear map of independent noises: state i is row block i.
    state = torch.cat([torch.eye(d, dtype=torch.float64), torch.zeros(d, d * steps, dtype=torch.float64)], dim=1)
    states = [state]
    for step in range(1, steps + 1):
        step_map = torch.eye(d, dtype=torch.float64) + 0.5 * torch.randn(d, d, generator=generator, dtype=torch.float64)
        noise = torch.zeros_like(state)
        noise[:, step * d : (step + 1) * d] = 0.3 * torch.eye(d, dtype=torch.float64)
        state = step_map @ state + noise
        states.append(state)

    def information(first: int, last: int) -> float:
        both = torch.cat([states[first], states[last]])
        return gaussian_information(both @ both.T, d)

    for first, last in combinations(range(steps + 1), 2):
        for member in range(first, last):
            assert information(first, last) <= information(member, member + 1) + 1e-9


def test_redundancy_is_one_for_linear_maps_and_zero_for_independent_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(4000, 5, generator=generator) for _ in range(2))
    turned = x @ torch.randn(5, 5, generator=generator)
    assert redundancy(x, turned, 1e-3) == pytest.approx(1, abs=1e-3)
    assert redundancy(x, other, 1e-3) == pytest.approx(0, abs=1e-3)
    half = redundancy(x, torch.cat([x[:, :2], other[:, :2]], dim=1), 1e-3)
    assert half == pytest.approx(0.5, abs=1e-2)
    assert redundancy(turned, x + other, 1e-3) == pytest.approx(redundancy(x, x + other, 1e-3), abs=1e-3)


@pytest.mark.parametrize("x", [torch.zeros(50, 3), torch.ones(1, 3)])
def test_constants_have_no_information(x: Tensor) -> None:
    assert redundancy(x, x, 1e-3) == 0


def test_independent_rows_stay_independent_with_few_rows() -> None:
    """600 rows of 300 columns: uncompressed, chance alone would explain half of the variance."""
    generator = torch.Generator().manual_seed(0)
    x, y = (principal_rows(torch.randn(600, 300, generator=generator)) for _ in range(2))
    assert x.shape == (600, 30)
    assert redundancy(x, y, 1e-3) < 0.02
    assert redundancy(x, x, 1e-3) > 0.99


def test_principal_rows_keep_the_largest_variance() -> None:
    rows = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(40)
    reduced = principal_rows(rows + 7)
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0)).flip(0)
    torch.testing.assert_close(reduced.square().mean(0), values[:10], rtol=1e-6, atol=1e-6)
    assert principal_rows(rows[:, :8]).shape == (200, 8)
