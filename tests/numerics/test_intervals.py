"""Intervals cover what they claim to cover, also where textbook formulas collapse."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import multinomial

from deploypipe.numerics.intervals import (
    interval_of_drop_pp,
    interval_of_mean,
    interval_of_median,
    interval_of_median_ratio,
)
from deploypipe.records import Interval

Z = 1.959963984540054


def test_median_interval_covers_the_true_median() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = interval_of_median(generator.lognormal(size=100), num_resamples=400)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.91 <= hits / 300 <= 0.99


def test_blocks_keep_the_coverage_of_slowly_drifting_timings() -> None:
    generator = np.random.default_rng(1)
    hits = {1: 0, 10: 0}
    for _ in range(150):
        spells = np.repeat(generator.normal(scale=1.0, size=40), 10)  # the machine is slow for ten runs at a time
        samples = 10 + spells + generator.normal(scale=0.1, size=400)
        for block in hits:
            interval = interval_of_median(samples, block=block, num_resamples=300)
            hits[block] += interval.low <= 10 <= interval.high
    assert hits[10] / 150 >= 0.88
    assert hits[1] / 150 < 0.7  # what ignoring the spells would claim


def test_ratio_interval_cancels_what_both_files_suffered() -> None:
    generator = np.random.default_rng(2)
    hits, widths = 0, []
    for _ in range(150):
        spell = np.repeat(generator.lognormal(sigma=0.3, size=40), 10)
        dense = 4.0 * spell * generator.lognormal(sigma=0.02, size=400)
        compressed = 2.0 * spell * generator.lognormal(sigma=0.02, size=400)
        interval = interval_of_median_ratio(compressed, dense, block=10, num_resamples=300)
        hits += interval.low <= 0.5 <= interval.high
        widths.append(interval.high - interval.low)
    assert hits / 150 >= 0.9
    assert np.median(widths) < 0.05  # the spells alone would be +-10 %


def test_wilson_equals_published_values() -> None:
    interval = interval_of_mean([1.0] * 81 + [0.0] * 182)  # Newcombe, Statistics in Medicine 17:857, table I
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)
    perfect = interval_of_mean([1.0] * 20)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.8389, abs=5e-5)


def test_mean_of_a_continuous_metric_covers() -> None:
    generator = np.random.default_rng(3)
    intervals = [interval_of_mean(generator.beta(5, 2, size=40)) for _ in range(1000)]
    assert 0.93 <= np.mean([i.low <= 5 / 7 <= i.high for i in intervals]) <= 0.97


def test_drop_without_discordant_pairs_is_not_a_point() -> None:
    same = np.array([1.0] * 900 + [0.0] * 100)
    interval = interval_of_drop_pp(same, same)
    assert interval.value == 0
    assert interval.high == pytest.approx(100 * Z**2 / (1000 + Z**2), rel=1e-6)
    assert interval.low == pytest.approx(-interval.high)


@pytest.mark.parametrize(("n", "b", "c"), [(44, 0, 1), (100, 12, 3), (1000, 1, 0)])
def test_drop_bound_is_where_the_score_test_starts_to_reject(n: int, b: int, c: int) -> None:
    dense, compressed = np.ones(n), np.ones(n)
    compressed[:b], dense[b : b + c] = 0, 0
    interval = interval_of_drop_pp(dense, compressed)
    mirrored = interval_of_drop_pp(compressed, dense)
    assert interval.value == pytest.approx(100 * (b - c) / n)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))
    for delta, side in ((interval.low / 100, 1), (interval.high / 100, -1)):

        def unlikely(q: float, delta: float = delta) -> float:  # trinomial, p(b) = q + delta, p(c) = q
            cells = np.array([q + delta, q, 1 - 2 * q - delta])
            return -float(np.sum(xlogy([b, c, n - b - c], np.maximum(cells, 1e-300))))

        q = minimize_scalar(
            unlikely, bounds=(max(0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        score = (b - c - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
        assert score == pytest.approx(side * Z, rel=1e-3)


@pytest.mark.parametrize(("p_worse", "p_better", "n"), [(0.01, 0.005, 200), (0.05, 0.02, 100), (0.002, 0.002, 500)])
def test_drop_covers_with_few_discordant_pairs(p_worse: float, p_better: float, n: int) -> None:
    def interval(b: int, c: int) -> Interval:
        dense, compressed = np.ones(n), np.ones(n)
        compressed[:b] = 0
        dense[b : b + c] = 0
        return interval_of_drop_pp(dense, compressed)

    # Exact, by enumeration; a score interval of counts may dip a little below its nominal level (Newcombe 1998).
    truth, covered = 100 * (p_worse - p_better), 0.0
    for b, c in product(range(25), repeat=2):
        probability = multinomial.pmf([b, c, n - b - c], n, [p_worse, p_better, 1 - p_worse - p_better])
        covered += probability * (interval(b, c).low <= truth <= interval(b, c).high)
    assert covered >= 0.93


def test_extremes_and_wrong_input() -> None:
    worst = interval_of_drop_pp(np.ones(10), np.zeros(10))
    assert worst.value == worst.high == 100
    assert 0 < worst.low < 100
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="interval needs"):
            interval_of_mean(bad)
    with pytest.raises(ValueError, match="not pairs"):
        interval_of_drop_pp([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="two blocks"):
        interval_of_median([1.0] * 19, block=10)
