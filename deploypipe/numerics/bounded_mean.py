"""Bounds on a mean that hold for heavy tails, and for losses so rare that no sample shows one.

One value is added to the n values, at the far end of the possible range: the loss that was not seen. With weights w
from a flat Dirichlet distribution, the bound is a quantile of the weighted mean sum_i w_i x_i (Learned-Miller and
Thomas, arXiv:1905.06208). For zeros and ones this is the exact bound of Clopper and Pearson; its width is never zero.

With g_i exponential, P(sum w_i x_i >= m) = P(sum g_i (x_i - m) >= 0). The saddlepoint formula of Barndorff-Nielsen
(1986) gives this without random numbers, to about a percent.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_NEAR = 1e-12  # so close to a pole or to the end of a range, as a share of it, nothing is evaluated
_FLAT = 1e-4  # deviates below it follow from the skewness; the formula would divide zero by zero


def ends_of(*metrics: Array) -> tuple[float, float]:
    """The lowest and highest value that a metric can have, estimated from the values of all networks.

    Fractions, all within [0, 1], can have any value there. Every other metric is assumed to have twice the observed
    range, zero included: in simulations with log-normal losses the observed range was too small for samples of 50.
    """
    low, high = min(float(m.min()) for m in metrics), max(float(m.max()) for m in metrics)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    low, high = min(0.0, low), max(0.0, high)
    return low - (high - low) / 2, high + (high - low) / 2


def upper_bound(values: Array, end: float, error: float) -> float:
    """Upper bound on the mean of the distribution of `values` (n,): exceeded with probability at most `error` (<= 0.1).

    No value can be above `end`. O(n).
    """
    distinct, counts = _with_end(values, end)
    mean = float(counts @ distinct / counts.sum())
    if len(distinct) == 1:
        return end
    level = float(ndtri(1 - error))

    def excess(bound: float) -> float:
        return _deviate(distinct, counts, bound) - level

    last = end - _NEAR * (end - mean)
    return float(brentq(excess, mean, last, rtol=1e-9)) if excess(last) > 0 else end


def chance_of_mean_above(values: Array, end: float, mean: float) -> float:
    """One-sided p-value for a true mean of `mean` or more: the `error` at which `upper_bound` equals `mean`."""
    distinct, counts = _with_end(values, end)
    if mean >= end:
        return 0.0
    return 1.0 if mean <= distinct[0] else float(ndtr(-_deviate(distinct, counts, mean)))


def _with_end(values: Array, end: float) -> tuple[Array, Array]:
    """Distinct values, ascending, and their counts, with the unseen value included."""
    distinct, counts = np.unique(np.append(values, end), return_counts=True)
    return distinct, counts.astype(np.float64)


def _deviate(distinct: Array, counts: Array, bound: float) -> float:
    """z with P(sum_i g_i (x_i - bound) >= 0) = 1 - Phi(z); `bound` lies between the lowest and the highest value."""
    offsets = distinct - bound
    scaled = offsets / np.abs(offsets).max()
    low, high = float(scaled[0]), float(scaled[-1])

    def slope(t: float) -> float:  # of the cumulant generating function, without its poles at the two ends
        return float((counts * scaled / (1 - t * scaled)).sum()) * (1 - t * low) * (1 - t * high)

    room = 1 - _NEAR
    t = float(brentq(slope, room / low, room / high, xtol=1e-14 * (1 / high - 1 / low), rtol=1e-12))
    rest = 1 - t * scaled
    root = math.copysign(math.sqrt(max(0.0, 2 * float(counts @ np.log(rest)))), t)
    if abs(root) < _FLAT:
        return float(counts @ scaled**3) / (3 * math.pow(float(counts @ scaled**2), 1.5))
    curvature = float(counts @ (scaled / rest) ** 2)
    return root + math.log(t * math.sqrt(curvature) / root) / root
