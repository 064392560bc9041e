"""Test whether one network is worse than another, from their results on the same samples."""

import numpy as np
from scipy.stats import binom

from deploypipe.numerics.bounded_mean import Array, chance_of_mean_above, ends_of


def chance_if_not_worse(
    results: Array,  # (n samples,), higher is better
    reference: Array,  # (n samples,), of the same samples in the same order
) -> float:
    """One-sided p-value: P(the observed deficit or a larger one | the network is no worse than the reference).

    Zeros and ones: the exact sign test on the samples that only one of them gets right (McNemar 1947). Other values:
    `bounded_mean`'s lower bound on the mean deficit. For samples drawn without replacement from a finite split both
    err on the safe side. O(n).
    """
    difference = reference - results
    if np.isin(results, (0.0, 1.0)).all() and np.isin(reference, (0.0, 1.0)).all():
        lost, gained = int((difference > 0).sum()), int((difference < 0).sum())
        return float(binom.sf(lost - 1, lost + gained, 0.5))
    low, high = ends_of(results, reference)
    return chance_of_mean_above(-difference, high - low, 0.0)
