"""Latency intervals contain the true value on a machine whose speed drifts, with the product's own schedule."""

import numpy as np
import pytest
from latency_coverage import simulate

from deploypipe.numerics.intervals import interval_of_quantile


@pytest.mark.parametrize(("kind", "share"), [("wandering", 0.1), ("wandering", 1.0), ("wave", 1.0), ("wave", 2.0)])
def test_intervals_hold_the_truth_under_drifts_up_to_the_length_of_the_measurement(kind: str, share: float) -> None:
    """In 93 % at least, and a network at its limit ships in 5 % at most; three standard errors are allowed for."""
    n = 150
    found = simulate(kind, share, n, num_resamples=20)
    least, most = 0.93 - 3 * np.sqrt(0.93 * 0.07 / n), 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)
    assert found.absolute >= least and found.absolute_ships <= most
    assert found.relative >= least and found.relative_ships <= most


def test_on_a_quiet_machine_the_absolute_interval_is_still_narrow() -> None:
    assert simulate("none", 0.0, 20, num_resamples=20).width < 0.015


def test_one_slow_trend_widens_the_interval() -> None:
    """Speed rises by 2 % in the course of 640 runs: where it was before and goes on to, these runs do not show."""
    samples = 4.0 * np.linspace(1.0, 1.02, 640) * np.exp(np.random.default_rng(0).normal(scale=0.002, size=640))
    interval = interval_of_quantile(samples, 0.5, block=20)
    assert interval.high > 1.03 * interval.value and interval.low < 0.97 * interval.value
