"""Ranges for 8 bits: against the error of rounding real values, and edge cases."""

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from deploypipe.numerics.int8_range import LEVELS, ClippingMethod, clip_range

METHODS: tuple[ClippingMethod, ...] = get_args(ClippingMethod)
IGNORING_FEW: tuple[ClippingMethod, ...] = ("percentile", "entropy")


def clipped(method: ClippingMethod, values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return clip_range(method, np.histogram(values, 2048, (low, high))[0], low, high)


def rounding_error(values: NDArray[np.float64], low: float, high: float) -> float:
    step = (max(high, 0) - min(low, 0)) / (LEVELS - 1)
    rounded = np.clip(np.round(values / step) * step, min(low, 0), max(high, 0))
    return float(((rounded - values) ** 2).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0.0, 3.0, -50.0, 50.0])
def test_the_range_lies_within_the_observed_values(method: ClippingMethod, shift: float) -> None:
    values = np.random.default_rng(0).standard_normal(20_000) + shift
    low, high = clipped(method, values)
    assert values.min() <= low < high <= values.max()


def test_minmax_covers_all_values() -> None:
    values = np.random.default_rng(0).standard_cauchy(10_000)
    assert clipped("minmax", values) == (values.min(), values.max())


@pytest.mark.parametrize("method", IGNORING_FEW)
def test_a_single_outlier_is_clipped(method: ClippingMethod) -> None:
    values = np.append(np.random.default_rng(0).standard_normal(200_000), 30.0)
    low, high = clipped(method, values)
    assert 3 < high < 10
    assert rounding_error(values[:-1], low, high) < rounding_error(values[:-1], values.min(), values.max()) / 5


def test_a_uniform_distribution_is_not_clipped() -> None:
    low, high = clipped("mse", np.linspace(-2, 2, 100_000))
    assert low < -1.95 and high > 1.95


@pytest.mark.parametrize("spread", ["normal", "laplace", "relu"])
def test_mse_finds_the_smallest_error(spread: str) -> None:
    generator = np.random.default_rng(1)
    values = generator.laplace(size=100_000) if spread == "laplace" else generator.standard_normal(100_000)
    values = np.maximum(values, 0) if spread == "relu" else values
    least = min(
        rounding_error(values, max(values.min(), -t), min(values.max(), t))
        for t in np.abs(values).max() * np.linspace(0.05, 1, 200)
    )
    assert rounding_error(values, *clipped("mse", values)) < 1.05 * least


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_zeros_of_a_relu_do_not_change_the_range(method: ClippingMethod) -> None:
    positive = np.abs(np.random.default_rng(0).standard_normal(100_000))
    few, many = (clipped(method, np.append(positive, np.zeros(n))) for n in (1, 10_000_000))
    assert many == pytest.approx(few, rel=0.05)
    assert many[1] > 2.5


@pytest.mark.parametrize("method", METHODS)
def test_no_values_or_a_single_value(method: ClippingMethod) -> None:
    assert clip_range(method, np.zeros(2048, dtype=np.int64), -1.0, 2.0) == (-1.0, 2.0)
    assert clip_range(method, np.zeros(2048, dtype=np.int64), 3.0, 3.0) == (3.0, 3.0)
