"""Confidence intervals for timings and accuracies: numbers in, `Interval` out.

    n          samples of one file or of one split
    block      consecutive timed runs of one file that are resampled together
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

from deploypipe.records import Interval

Samples: TypeAlias = NDArray[np.float64] | Sequence[float]

_MAX_VALUES_AT_ONCE = 4_000_000  # resampled values held in memory, 32 MB
_TINY = 1e-12


def interval_of_median(
    samples: Samples, *, block: int = 1, seed: int = 0, confidence: float = 0.95, num_resamples: int = 2000
) -> Interval:
    """Percentile bootstrap of a median, in the unit of `samples` (n,), float64.

    With `block` > 1 blocks of consecutive samples are drawn (non-overlapping block bootstrap, Carlstein 1986), so that
    slow drifts of the machine's clock widen the interval; the up to block - 1 samples at the end that fill no block
    enter the value but not the resamples. O(num_resamples * n). Biased narrow for fewer than about ten blocks.
    """
    values = _checked(samples)
    medians = _resampled_medians([values], block, seed, num_resamples)[0]
    return _percentiles(float(np.median(values)), medians, confidence)


def interval_of_median_ratio(
    numerator: Samples,
    denominator: Samples,
    *,
    block: int = 1,
    seed: int = 0,
    confidence: float = 0.95,
    num_resamples: int = 2000,
) -> Interval:
    """Bootstrap of median(numerator) / median(denominator), both (n,) > 0 and timed in alternating blocks.

    Block i of both was timed within the same few milliseconds and is drawn together, so a slow spell of the machine,
    which hits both, cancels in the ratio as it does in the measurement. Otherwise as `interval_of_median`. Raises
    ValueError where the lengths differ or a value is not above zero.
    """
    top, bottom = _checked(numerator), _checked(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} and {len(bottom)} samples are not interleaved; time both files equally often")
    if min(top.min(), bottom.min()) <= 0:
        raise ValueError("a ratio of medians needs samples above zero")
    medians = _resampled_medians([top, bottom], block, seed, num_resamples)
    return _percentiles(float(np.median(top) / np.median(bottom)), medians[0] / medians[1], confidence)


def interval_of_mean(values: Samples, *, confidence: float = 0.95) -> Interval:
    """The mean of a per-sample metric (n,), in its own unit.

    Zeros and ones: Wilson's score interval (Wilson 1927), which stays inside [0, 1] and has width at 0 and n hits.
    Anything else: Student's t, which needs n >= 2 and is approximate for skewed metrics under about 30 samples.
    """
    checked = _checked(values)
    if not _is_binary(checked):
        return _t_interval(checked, confidence)
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

    Zeros and ones: Tango's score interval for paired proportions (Tango, Statistics in Medicine 17:891, 1998). It is
    the one that keeps its coverage with few discordant pairs; with none at all it is +-100 z^2 / (n + z^2), not zero.
    Anything else: Student's t on the differences, n >= 2; identical values give it no width. Raises ValueError where
    the lengths differ.
    """
    before, after = _checked(dense), _checked(compressed)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} values are not pairs; evaluate both on the same samples")
    if not (_is_binary(before) and _is_binary(after)):
        return _t_interval(100 * (before - after), confidence)
    n, b, c = len(before), int(np.sum(before > after)), int(np.sum(before < after))
    return Interval(
        value=100 * (b - c) / n,
        low=-100 * _tango_upper(n, c, b, _z(confidence)),
        high=100 * _tango_upper(n, b, c, _z(confidence)),
        confidence=confidence,
    )


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

    # Without discordant pairs the variance, and so `excess`, is zero at `seen` itself: the root wanted is the next one.
    return float(brentq(excess, seen + _TINY, 1.0, xtol=1e-12))


def _t_interval(values: NDArray[np.float64], confidence: float) -> Interval:
    if len(values) < 2:
        raise ValueError("one value has no spread; an interval needs two or more")
    mean = float(values.mean())
    quantile = float(t.ppf((1 + confidence) / 2, df=len(values) - 1))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - half, high=mean + half, confidence=confidence)


def _resampled_medians(
    series: Sequence[NDArray[np.float64]], block: int, seed: int, num_resamples: int
) -> NDArray[np.float64]:
    """(len(series), num_resamples): medians over blocks drawn with replacement, the same blocks from every series."""
    num_blocks = len(series[0]) // block
    if num_blocks < 2:
        raise ValueError(f"{len(series[0])} samples make fewer than two blocks of {block}; take more samples")
    blocks = [values[: num_blocks * block].reshape(num_blocks, block) for values in series]
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_VALUES_AT_ONCE // (num_blocks * block))
    parts = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        drawn = generator.integers(num_blocks, size=(size, num_blocks))
        parts.append([np.median(b[drawn].reshape(size, -1), axis=1) for b in blocks])
    return np.concatenate(parts, axis=1)


def _percentiles(value: float, resampled: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)), confidence=confidence)


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
