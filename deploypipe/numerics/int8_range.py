"""Choose the range in which a tensor is rounded to 8 bits, from a histogram of its values.

    counts      (bins,) how many values lie in each of equally wide bins over [low, high]
    low, high   the lowest and highest value seen
    threshold   values are clipped to [max(low, -threshold), min(high, threshold)]
    LEVELS      256: the number of values of 8 bits

All ranges lie within [low, high]. Cost: O(bins * candidates), less than a millisecond per tensor. Without values, or
with a single one, the range is [low, high].
"""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

ClippingMethod: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]

LEVELS = 256
_NUM_CANDIDATES = 128
_SMALLEST_SHARE = 1 / 16  # of the largest magnitude: the lowest threshold tried
_PERCENTILE = 99.99  # of the values stay inside, half of the rest beyond either end
_TINY = 1e-12


def clip_range(method: ClippingMethod, counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The range to round.

    minmax: all values. percentile: 99.99 % of the values. entropy: the threshold whose rounded histogram is nearest to
    the true one in Kullback-Leibler divergence (Migacz, GTC 2017, with 256 levels and both signs). mse: the threshold
    of least squared error, from rounding and clipping together. Both ignore exact zeros, which no threshold changes:
    with the many zeros of a ReLU, entropy would clip nearly everything else.
    """
    if method == "minmax" or high <= low or counts.sum() == 0:
        return low, high
    if method == "percentile":
        return _percentile(counts, low, high)
    thresholds = max(abs(low), abs(high)) * np.linspace(_SMALLEST_SHARE, 1, _NUM_CANDIDATES)
    loss, others = _divergence if method == "entropy" else _squared_error, _without_zeros(counts, low, high)
    losses = [loss(others, low, high, threshold) for threshold in thresholds]
    # The widest of equally good ranges: values unseen in calibration are more likely to lie outside than inside.
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    return _clipped(low, high, float(thresholds[best]))


def _clipped(low: float, high: float, threshold: float) -> tuple[float, float]:
    return max(low, -threshold), min(high, threshold)


def _without_zeros(counts: NDArray[np.int64], low: float, high: float) -> NDArray[np.int64]:
    """The bin that holds zero, cut to the larger of its neighbours."""
    zero = int(len(counts) * -low / (high - low))
    if not 0 <= zero < len(counts):
        return counts
    others = counts.copy()
    others[zero] = min(counts[zero], np.delete(counts[max(zero - 1, 0) : zero + 2], min(zero, 1)).max(initial=0))
    return others


def _percentile(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    edges = np.linspace(low, high, len(counts) + 1)
    share = np.cumsum(counts) / counts.sum()
    tail = (1 - _PERCENTILE / 100) / 2
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    return float(edges[first]), float(edges[min(last, len(counts) - 1) + 1])


def _squared_error(counts: NDArray[np.int64], low: float, high: float, threshold: float) -> float:
    bottom, top = _clipped(low, high, threshold)
    if top <= bottom:  # all values lie on one side, beyond the threshold
        return float("inf")
    middles = _middles(counts, low, high)
    beyond = middles - np.clip(middles, bottom, top)
    step = _span(bottom, top) / (LEVELS - 1)
    inside = counts[beyond == 0].sum()
    return float((counts * beyond**2).sum() + inside * step**2 / 12)


def _divergence(counts: NDArray[np.int64], low: float, high: float, threshold: float) -> float:
    bottom, top = _clipped(low, high, threshold)
    middles = _middles(counts, low, high)
    inside = (middles >= bottom) & (middles <= top)
    if top <= bottom or inside.sum() < LEVELS or not counts[inside].any():  # each bin a level of its own: no rounding
        return float("inf")
    kept = counts[inside].astype(np.float64)
    true = kept.copy()
    true[0] += counts[middles < bottom].sum()
    true[-1] += counts[middles > top].sum()
    level = np.minimum((LEVELS * (middles[inside] - bottom) / (top - bottom)).astype(np.int64), LEVELS - 1)
    filled = (kept > 0).astype(np.float64)
    totals, sizes = np.bincount(level, kept, LEVELS), np.bincount(level, filled, LEVELS)
    rounded = np.where(filled > 0, (totals / np.maximum(sizes, 1))[level], 0.0)
    p, q = true / true.sum(), rounded / rounded.sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], _TINY))).sum())


def _middles(counts: NDArray[np.int64], low: float, high: float) -> NDArray[np.float64]:
    return low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)


def _span(bottom: float, top: float) -> float:
    """The range that the levels must cover; zero is always one of them."""
    return max(top, 0.0) - min(bottom, 0.0)
