"""Intervals have the coverage they claim, also where textbook formulas fail."""

from itertools import product

import numpy as np
import pytest
from accuracy_coverage import SHAPES, rates
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter
from scipy.special import xlogy
from scipy.stats import beta, multinomial

from deploypipe.numerics.bounded_mean import chance_of_mean_above, upper_bound
from deploypipe.numerics.intervals import (
    _signed_rank,
    interval_of_drop_pp,
    interval_of_mean,
    interval_of_median_ratio,
    interval_of_quantile,
    seems_worse,
)
from deploypipe.records import Interval

Z = 1.959963984540054


def test_median_interval_covers_the_true_median() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = interval_of_quantile(generator.lognormal(size=100), 0.5, num_resamples=400)
        hits += interval.low <= 1.0 <= interval.high
    assert hits / 300 >= 0.95


def test_blocks_keep_the_coverage_of_slowly_drifting_timings() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(150):
        spells = np.repeat(generator.normal(scale=1.0, size=40), 10)  # the machine is slow for ten runs at a time
        samples = 10 + spells + generator.normal(scale=0.1, size=400)
        interval = interval_of_quantile(samples, 0.5, block=10, num_resamples=300)
        hits += interval.low <= 10 <= interval.high
    assert hits / 150 >= 0.93


def test_intervals_of_times_are_never_negative() -> None:
    ramp = np.linspace(0.01, 1.0, 400)  # a machine that becomes a hundred times slower
    interval = interval_of_quantile(ramp, 0.5, block=20)
    assert interval.low == 0.0 and interval.value < interval.high


def test_the_ratio_interval_cancels_common_slowdowns() -> None:
    generator = np.random.default_rng(2)
    hits, widths = 0, []
    for _ in range(150):
        spell = np.repeat(generator.lognormal(sigma=0.3, size=40), 10)
        dense = 4.0 * spell * generator.lognormal(sigma=0.02, size=400)
        compressed = 2.0 * spell * generator.lognormal(sigma=0.02, size=400)
        interval = interval_of_median_ratio(compressed, dense, block=10)
        hits += interval.low <= 0.5 <= interval.high
        widths.append(interval.high - interval.low)
    assert hits / 150 >= 0.9
    assert np.median(widths) < 0.05  # the spells alone would be +-10 %


def timeline(generator: np.random.Generator, length: int, mood: str) -> np.ndarray:
    """Log slowdown of the machine, run by run."""
    if mood == "quiet":
        return generator.normal(scale=0.01, size=length)
    if mood == "wandering":  # AR(1), remembered for some fifty runs
        return np.asarray(lfilter([1.0], [1.0, -0.98], generator.normal(scale=0.02, size=length)))
    in_burst = np.zeros(length, dtype=bool)  # neighbours that take the processor for some runs
    for start in generator.integers(length, size=length // 60):
        in_burst[start : start + generator.geometric(1 / 20)] = True
    return generator.normal(scale=0.02, size=length) + in_burst * generator.lognormal(-1, 0.7, size=length)


def timed(generator: np.random.Generator, ratio: float, mood: str, openings: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Two files timed A B B A (or B A A B) by tens after each opening, which moves each by some tenths of a percent,
    and the one that was opened first by half a percent more."""
    slow = timeline(generator, 40 * openings, mood).reshape(openings, 4, 10)
    first, opened = (generator.permutation(np.arange(openings) % 2) for _ in range(2))
    logs = np.empty((2, openings, 2, 10))
    for i in range(openings):
        logs[first[i], i], logs[1 - first[i], i] = slow[i, [0, 3]], slow[i, [1, 2]]
        logs[:, i] += generator.normal(scale=0.003, size=(2, 1, 1))
        logs[opened[i], i] += 0.005
    logs[1] += np.log(ratio)
    times = 0.1 * np.exp(logs.reshape(2, -1))
    return times[1], times[0]


@pytest.mark.parametrize("mood", ["quiet", "wandering", "bursty"])
def test_a_file_against_itself_shows_no_difference_on_any_machine(mood: str) -> None:
    generator = np.random.default_rng(4)
    intervals = [interval_of_median_ratio(*timed(generator, 1.0, mood), block=20) for _ in range(400)]
    assert np.mean([i.low <= 1 <= i.high for i in intervals]) >= 0.95


def test_a_difference_of_three_percent_is_detected() -> None:
    generator = np.random.default_rng(5)
    for mood, least in (("quiet", 1.0), ("wandering", 0.6)):
        intervals = [interval_of_median_ratio(*timed(generator, 1.03, mood), block=20) for _ in range(100)]
        assert np.mean([i.low > 1 for i in intervals]) >= least
        assert np.mean([i.low <= 1.03 <= i.high for i in intervals]) >= 0.94


def test_effects_of_opening_files_are_missed_with_smaller_blocks() -> None:
    generator = np.random.default_rng(6)
    pairs = [timed(generator, 1.0, "quiet", openings=8) for _ in range(200)]
    covered = {
        b: np.mean([(i := interval_of_median_ratio(*p, block=b)).low <= 1 <= i.high for p in pairs]) for b in (1, 20)
    }
    assert covered[20] >= 0.95
    assert covered[1] < 0.9


def test_signed_rank_interval_equals_published_critical_values() -> None:
    # Two-sided 5 %, W critical (Wilcoxon and Wilcox 1964): 0 for n = 6, 8 for 10, 52 for 20; an interval begins one on.
    assert [_signed_rank(n, 0.95) for n in (5, 6, 10, 20)] == [0, 1, 9, 53]
    assert _signed_rank(61, 0.95) - _signed_rank(60, 0.95) in (20, 21, 22, 23)  # exact, then normal: no jump


def test_few_blocks_use_students_t() -> None:
    interval = interval_of_median_ratio(np.exp([0.1, 0.2, 0.3]), np.ones(3))
    half = 6.964557 * 0.1 / np.sqrt(3)  # Student's t, two degrees, 98 %
    assert (np.log(interval.low), np.log(interval.high)) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)
    with pytest.raises(ValueError, match="not interleaved"):
        interval_of_median_ratio([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="above zero"):
        interval_of_median_ratio([1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize(("share", "truth", "least"), [(0.5, 10.0, 0.93), (0.9, 11.2816, 0.93)])
def test_quantile_interval_covers_with_few_blocks_of_dependent_samples(
    share: float, truth: float, least: float
) -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        samples = 10 + generator.normal(size=(20, 40)) * 0.8 + 0.6 * generator.normal(size=(20, 1))  # variance 1
        interval = interval_of_quantile(samples.ravel(), share, block=40, num_resamples=300)
        hits += interval.low <= truth <= interval.high
    assert hits / 200 >= least


def test_wilson_equals_published_values() -> None:
    interval = interval_of_mean([1.0] * 81 + [0.0] * 182)  # Newcombe, Statistics in Medicine 17:857, table I
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)
    perfect = interval_of_mean([1.0] * 20)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.8389, abs=5e-5)


def test_mean_of_a_continuous_metric_covers() -> None:
    generator = np.random.default_rng(3)
    intervals = [interval_of_mean(generator.beta(5, 2, size=40)) for _ in range(100)]
    assert np.mean([i.low <= 5 / 7 <= i.high for i in intervals]) >= 0.93
    assert np.median([i.high - i.low for i in intervals]) < 1.5 * 2 * Z * np.sqrt(0.02551 / 40)  # not by being wide


@pytest.mark.parametrize("num_samples", [50, 200])
@pytest.mark.parametrize("is_fraction", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_loss_exactly_at_the_limit_rarely_passes(shape: str, is_fraction: bool, num_samples: int) -> None:
    found = rates(shape, num_samples, 100, is_fraction=is_fraction)
    assert found.shipped <= 0.05


def test_rare_total_losses_pass_students_t_but_not_the_bounds() -> None:
    assert rates("1 % lose 100", 50, 100, is_fraction=True).shipped_by_t > 0.4  # so the test above can fail


def test_a_choice_detects_losses_that_a_release_cannot_exclude() -> None:
    random = np.random.default_rng(3)
    top = random.normal(20, 5, size=200)
    worse = top - random.normal(0.2, 0.5, size=200)
    assert seems_worse(worse, top) and not seems_worse(top, worse) and not seems_worse(top, top)
    assert interval_of_drop_pp(top, worse).low < 0 < interval_of_drop_pp(top, worse).high
    hits, fewer = np.ones(200), np.r_[np.ones(190), np.zeros(10)]
    assert seems_worse(fewer, hits) and not seems_worse(hits, fewer)


@pytest.mark.parametrize("level", [0.5, 7.0, -3.0])
def test_equal_differences_still_have_an_interval(level: float) -> None:
    dense = np.full(50, level)
    for compressed in (dense, dense - 0.01):
        interval = interval_of_drop_pp(dense, compressed)
        assert interval.low < interval.value - 1 and interval.high > interval.value + 1
    enough = interval_of_drop_pp(np.full(1000, 0.5), np.full(1000, 0.5))
    assert enough.high == pytest.approx(100 * Z**2 / (1000 + Z**2), rel=0.05)  # as for zeros and ones


@pytest.mark.parametrize(("n", "k"), [(1, 0), (2, 0), (50, 0), (50, 1), (50, 49), (1000, 3), (1000, 500)])
def test_the_bound_of_zeros_and_ones_equals_clopper_pearson(n: int, k: int) -> None:
    values = np.concatenate([np.ones(k), np.zeros(n - k)])
    expected = beta.ppf(0.975, k + 1, n - k)
    assert upper_bound(values, 1.0, 0.025) == pytest.approx(expected, rel=0.01)
    assert chance_of_mean_above(values, 1.0, expected) == pytest.approx(0.025, abs=0.002)
    assert upper_bound(np.ones(3), 1.0, 0.025) == 1.0


def test_bound_is_the_quantile_of_means_with_random_weights() -> None:
    generator = np.random.default_rng(8)
    values = generator.lognormal(size=30)
    weights = generator.dirichlet(np.ones(31), size=100_000)
    means = weights @ np.append(values, 20.0)
    for error in (0.1, 0.025, 0.005):
        assert upper_bound(values, 20.0, error) == pytest.approx(np.quantile(means, 1 - error), rel=0.02)
    for mean in (np.quantile(means, 0.05), float(np.append(values, 20.0).mean()), float(np.quantile(means, 0.9))):
        assert chance_of_mean_above(values, 20.0, mean) == pytest.approx(np.mean(means >= mean), abs=0.01)


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
        interval_of_quantile([1.0] * 19, 0.5, block=10)
