"""Confidence intervals for timings and accuracies: numbers in, `Interval` out.

    n          samples of one file or of one split
    block      consecutive timed runs of one file that are resampled together
    m, q       parts of a measurement, and the slow cosines they are projected on
    b, c       discordant pairs: dense right and compressed wrong, dense wrong and compressed right
    z          the normal quantile of the confidence, 1.96 for 0.95

Every bootstrap is seeded: the same samples give the same interval. Empty or non-finite samples raise ValueError.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm, t

from deploypipe.numerics.bounded_mean import ends_of, upper_bound
from deploypipe.records import Interval

Samples: TypeAlias = NDArray[np.float64] | Sequence[float]

_MAX_VALUES_AT_ONCE = 4_000_000  # resampled values held in memory, 32 MB
_TINY = 1e-12
_CARE = 0.4  # 98 % for 95 %
_CONFIDENCE = 0.95
_MAX_PARTS = 32  # of a measurement, for its drift
_DRIFT_FACTORS = (31.0, 13.5, 12.0)  # for 1, 2 and 3 cosines; more cosines need no smaller one
_EXACT_RANKS = 60  # differences; the normal approximation is good from about 25


def interval_of_quantile(
    samples: Samples, share: float, *, block: int = 1, seed: int = 0, num_resamples: int = 2000
) -> Interval:
    """95 % interval of the `share` quantile (0.5: the median) of timed runs (n,), in the order of measurement.

    It takes the wider of two intervals on each side. One is a block bootstrap: with `block` > 1, blocks of consecutive
    samples are drawn (non-overlapping, Carlstein 1986). Up to block - 1 samples at the end fill no block; they count in
    the value but not in the resamples. The percentile interval is widened about the value by the ratio of Student's t
    (number of blocks - 1 degrees of freedom) to the normal. The other interval allows for drift: see `_drift_reach`.

    For the median, coverage is at least 95 % for drifts with time constants up to the length of the measurement
    (`benchmarks/latency_coverage.py`). It covers the long-run quantile of such a machine. Changes rarer than once per
    measurement (another day, another temperature) cannot show in one measurement. O(num_resamples * n).
    """
    values = _checked(samples)
    num_blocks = len(values) // block
    resampled = _resampled_quantiles(values, share, block, seed, num_resamples)
    value = float(np.quantile(values, share))
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    few = math.sqrt(num_blocks / (num_blocks - 1)) * _t(num_blocks - 1, _CONFIDENCE) / _z(_CONFIDENCE)
    reach = _drift_reach(values)
    return Interval(
        value=value,
        low=max(0.0, min(value - reach, value - few * max(0.0, value - float(low)))),  # no run takes less than 0 ms
        high=max(value + reach, value + few * max(0.0, float(high) - value)),
        confidence=_CONFIDENCE,
    )


def _drift_reach(values: NDArray[np.float64]) -> float:
    """Distance within which the long-run median lies from that of these runs (n,), n >= 2: 95 % for a slow drift.

    The medians v_t of up to `_MAX_PARTS` parts of equal length are projected on the slowest cosines (q = 3):
    y_j = sqrt(2) / m * sum_t v_t cos(pi j (t - 1/2) / m). White noise moves each y_j as much as the mean. A drift as
    slow as the measurement moves them less, so the factor on their root mean square must be large. The factors
    are simulated: the largest 95 % quantile of |mean| / rms(y) of an Ornstein-Uhlenbeck process over time constants
    from 0 to the length of the measurement, which is the slowest (as Mueller, J. Business & Economic Statistics
    32:311, 2014, chooses critical values for series of unknown strong correlation).
    """
    parts = np.array_split(values, min(_MAX_PARTS, len(values)))
    medians = np.array([np.median(part) for part in parts])
    m, q = len(medians), min(len(medians) - 1, len(_DRIFT_FACTORS))
    cosines = np.cos(np.pi * np.outer(np.arange(1, q + 1), np.arange(m) + 0.5) / m)
    projections = math.sqrt(2) / m * (cosines @ medians)
    return _DRIFT_FACTORS[q - 1] * math.sqrt(float(np.mean(projections**2)))


def interval_of_median_ratio(
    numerator: Samples, denominator: Samples, *, block: int = 1, confidence: float = 0.95
) -> Interval:
    """The ratio of the median of `numerator` to that of `denominator`, both (n,) > 0 and timed interleaved.

    Block i of both was timed within the same few milliseconds. A slow period of the machine affects both and cancels
    in the ratio r_i of their medians. With m blocks, d_i = log r_i are m paired differences (up to block - 1 samples at
    the end that fill no block are left out). The value is exp of their Hodges-Lehmann estimate, the median of all
    (d_i + d_j) / 2. The interval is Wilcoxon's signed-rank interval. If chance decides which file comes first in a
    block, d_i of equal files is as likely as -d_i, whatever the machine does, so the interval is exact for them.

    It uses `_CARE` times the error that `confidence` allows: with an interval of exactly 95 %, half of all sets of a
    hundred equal pairs would show a difference in more than five. Below m = 7 (for 0.95) there is no signed-rank
    interval, and Student's t is used. O(m^2). Raises ValueError if the lengths differ, for fewer than two blocks and
    for values <= 0.
    """
    top, bottom = _checked(numerator), _checked(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} and {len(bottom)} samples are not interleaved; time both files equally often")
    if min(top.min(), bottom.min()) <= 0:
        raise ValueError("a ratio of medians needs samples above zero")
    medians = [np.median(_in_blocks(values, block), axis=1) for values in (top, bottom)]
    logs = np.log(medians[0] / medians[1])
    means = np.sort((logs[:, None] + logs)[np.triu_indices(len(logs))] / 2)
    value, careful = float(np.median(means)), 1 - _CARE * (1 - confidence)
    if rank := _signed_rank(len(logs), careful):
        low, high = float(means[rank - 1]), float(means[-rank])
    else:
        half = _t(len(logs) - 1, careful) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        low, high = min(value, float(logs.mean()) - half), max(value, float(logs.mean()) + half)
    return Interval(value=math.exp(value), low=math.exp(low), high=math.exp(high), confidence=confidence)


def interval_of_mean(values: Samples, *, confidence: float = 0.95) -> Interval:
    """Interval of the mean of a per-sample metric (n,), in its own unit.

    Zeros and ones: Wilson's score interval (Wilson 1927), which stays inside [0, 1] and has a width even at 0 and n
    hits. Other values: the bounds of `bounded_mean`, within the range assumed for the metric.
    """
    checked = _checked(values)
    if not _is_binary(checked):
        return _bounded_interval(checked, *ends_of(checked), confidence)
    n, share, z = len(checked), float(checked.mean()), _z(confidence)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(
        value=share,
        low=max(0.0, min(share, middle - half)),
        high=min(1.0, max(share, middle + half)),
        confidence=confidence,
    )


def interval_of_drop_pp(dense: Samples, compressed: Samples, *, confidence: float = 0.95) -> Interval:
    """100 * (mean(dense) - mean(compressed)) in percentage points, both (n,) on the same samples in the same order.

    Zeros and ones: Tango's score interval for paired proportions (Tango, Statistics in Medicine 17:891, 1998). It
    keeps its coverage with few discordant pairs; with none at all it is +-100 z^2 / (n + z^2), not zero. Other values:
    the bounds of `bounded_mean` on the mean difference; no difference is assumed to exceed the range of the metric. If
    no sample differs, the interval of a fraction is about 370 / n pp wide, as Tango's is. Raises ValueError if the
    lengths differ.
    """
    before, after = _checked(dense), _checked(compressed)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} values are not pairs; evaluate both on the same samples")
    if not (_is_binary(before) and _is_binary(after)):
        low, high = ends_of(before, after)
        return _bounded_interval(100 * (before - after), 100 * (low - high), 100 * (high - low), confidence)
    n, b, c = len(before), int(np.sum(before > after)), int(np.sum(before < after))
    return Interval(
        value=100 * (b - c) / n,
        low=-100 * _tango_upper(n, c, b, _z(confidence)),
        high=100 * _tango_upper(n, b, c, _z(confidence)),
        confidence=confidence,
    )


def seems_worse(results: NDArray[np.float64], reference: NDArray[np.float64]) -> bool:
    """Whether to prefer the reference, both (n,) on the same samples: the 95 % interval of the deficit is above zero.

    Zeros and ones: Tango's interval. Other values: Student's t. It detects more than the bounds that a release needs,
    and errs more often with heavy tails. An error loses a better network, but never ships a worse one. O(n).
    """
    if len(results) < 2 or (_is_binary(results) and _is_binary(reference)):
        return len(results) < 2 or interval_of_drop_pp(reference, results).low > 0
    deficit = reference - results
    margin = _t(len(deficit) - 1, 0.95) * float(deficit.std(ddof=1)) / math.sqrt(len(deficit))
    return float(deficit.mean()) > margin


def _tango_upper(n: int, b: int, c: int, z: float) -> float:
    """The largest difference of proportions that a two-sided score test at `z` does not reject; (b - c) / n is seen."""
    seen = (b - c) / n
    if seen + _TINY >= 1:
        return 1.0

    def excess(delta: float) -> float:  # squared score statistic against z^2, both times the variance
        linear = -b - c + (2 * n - b + c) * delta
        root = math.sqrt(max(0.0, linear**2 + 8 * n * c * delta * (1 - delta)))
        q21 = (root - linear) / (4 * n)  # maximum-likelihood p(dense wrong, compressed right) under this delta
        return (b - c - n * delta) ** 2 - z * z * n * (2 * q21 + delta * (1 - delta))

    # Without discordant pairs the variance, and so `excess`, is zero at `seen` itself; we need the next root.
    return float(brentq(excess, seen + _TINY, 1.0, xtol=1e-12))


def _bounded_interval(values: NDArray[np.float64], low: float, high: float, confidence: float) -> Interval:
    error = (1 - confidence) / 2
    return Interval(
        value=float(values.mean()),
        low=-upper_bound(-values, -low, error),
        high=upper_bound(values, high, error),
        confidence=confidence,
    )


def _resampled_quantiles(
    values: NDArray[np.float64], share: float, block: int, seed: int, num_resamples: int
) -> NDArray[np.float64]:
    """(num_resamples,): quantiles over blocks drawn with replacement."""
    blocks = _in_blocks(values, block)
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_VALUES_AT_ONCE // blocks.size)
    parts = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        drawn = generator.integers(len(blocks), size=(size, len(blocks)))
        parts.append(np.quantile(blocks[drawn].reshape(size, -1), share, axis=1))
    return np.concatenate(parts)


def _in_blocks(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """(blocks, block), at least two blocks; samples that fill no block are left out."""
    num_blocks = len(values) // block
    if num_blocks < 2:
        raise ValueError(f"{len(values)} samples make fewer than two blocks of {block}; take more samples")
    return values[: num_blocks * block].reshape(num_blocks, block)


def _signed_rank(n: int, confidence: float) -> int:
    """The largest k with P(W < k) <= (1 - confidence) / 2, W Wilcoxon's signed-rank statistic of n differences: the
    k-th smallest and the k-th largest mean of two differences bound the interval. 0 if n is too small for one.

    Exact up to `_EXACT_RANKS` differences, by counting the subsets of 1..n with each sum; normal above.
    """
    tail = (1 - confidence) / 2
    if n > _EXACT_RANKS:
        mean, deviation = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return max(0, math.floor(mean - _z(confidence) * deviation))
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1.0
    for rank in range(1, n + 1):
        counts[rank:] += counts[:-rank].copy()
    return int(np.searchsorted(np.cumsum(counts) / 2.0**n, tail, side="right"))


def _checked(samples: Samples) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"samples of shape {values.shape}; an interval needs one dimension and at least one value")
    if not np.isfinite(values).all():
        raise ValueError("samples hold NaN or infinity; an interval needs finite values")
    return values


def _is_binary(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _z(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2))


def _t(degrees: int, confidence: float) -> float:
    return float(t.ppf((1 + confidence) / 2, df=degrees))
