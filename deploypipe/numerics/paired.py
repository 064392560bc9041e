"""Whether one network is worse than another, from their results on the same samples."""

import math
from typing import Any, TypeAlias

import numpy as np
from scipy.stats import binom, t

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def chance_if_not_worse(
    results: Array,  # (n samples,), higher is better
    reference: Array,  # (n samples,), of the same samples in the same order
) -> float:
    """P(what was seen, or a clearer deficit | the network is no worse than the reference): a one-sided p-value.

    Zeros and ones: the exact sign test on the samples that only one of them gets right (McNemar 1947). Anything else:
    Student's t on the differences, approximate for skewed metrics under about 30 samples; 1 below two samples. For
    samples drawn without replacement from a finite split both err on the safe side. O(n).
    """
    difference = reference - results
    if np.isin(results, (0.0, 1.0)).all() and np.isin(reference, (0.0, 1.0)).all():
        lost, gained = int((difference > 0).sum()), int((difference < 0).sum())
        return float(binom.sf(lost - 1, lost + gained, 0.5))
    if len(difference) < 2:
        return 1.0
    mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
    if deviation == 0.0:
        return 0.0 if mean > 0 else 1.0
    return float(t.sf(mean / deviation * math.sqrt(len(difference)), df=len(difference) - 1))
