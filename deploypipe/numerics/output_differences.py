"""Measure how far outputs are from the expected ones. Needs only numpy, so it runs on devices without torch."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from deploypipe.records import Parity

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def difference(expected: Sequence[Sequence[Array]], seen: Sequence[Sequence[Array]]) -> Parity:
    """Compare `seen[batch][output]` with `expected[batch][output]`, of equal shapes; in float64, O(number of values).

    Non-finite values in `seen` make the errors and the cosine NaN, which no limit accepts.
    """
    num_outputs = len(expected[0])
    largest, error, total, count = (np.zeros(num_outputs) for _ in range(4))
    products = np.zeros((num_outputs, 3))  # of expected and seen; each with itself
    agreements = []
    for wanted, got in zip(expected, seen, strict=True):
        for i, (want, value) in enumerate(zip(wanted, got, strict=True)):
            a, b = want.astype(np.float64).ravel(), value.astype(np.float64).ravel()
            apart = np.abs(a - b)
            largest[i] = max(largest[i], np.abs(a).max(initial=0))
            error[i] = np.maximum(error[i], apart.max(initial=0))  # unlike max(), keeps NaN
            total[i] += apart.sum()
            count[i] += a.size
            products[i] += a @ b, a @ a, b @ b
        if wanted[0].ndim == 2 and wanted[0].shape[1] > 1 and len(wanted[0]):
            agreements.append(wanted[0].argmax(axis=1) == got[0].argmax(axis=1))
    scale = np.where(largest > 0, largest, 1)
    return Parity(
        max_abs_error=float((error / scale).max()),
        mean_abs_error=float((total / np.maximum(count, 1) / scale).max()),
        cosine=float(_cosines(products).min()),
        top1_agreement=float(np.concatenate(agreements).mean()) if agreements else None,
    )


def _cosines(products: Array) -> Array:
    """Cosine similarities: 1 if both vectors are zero, 0 if one is."""
    both, first, second = products.T
    norm = np.sqrt(first * second)
    cosines: Array = np.where(norm > 0, both / np.where(norm > 0, norm, 1), (first == second).astype(np.float64))
    return np.where(np.isnan(norm), np.nan, np.clip(cosines, -1, 1))
