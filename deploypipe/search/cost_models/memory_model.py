"""How much memory a file will take: told from its graph in milliseconds, where measuring takes three processes.

    W          MiB of the file's weights
    A          MiB of its activations, where most of them are held
    peak_mib   base + a W + b A, what `measure_peak_memory` finds with onnxruntime on the CPU

a and b are above one: weights are copied while they are loaded and laid out anew, and the second run plans one block
for the activations beside the pieces that the first run took (b falls to 1 where that block fits into the room that was
reserved by doubling: above some 50 MiB). Fit it to files of one network on one device, at the batch size and the
precision that it is to predict at: a ViT's activations in half precision or in 8 bits take half as much for their size.
It does not know which convolutions the processor lays out anew (widths in multiples of 8 or 16): a fifth of the peak of
one of eight pruned ResNet-56, at a batch of one. Measure what is close to a limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import t as student

from deploypipe.errors import DataError
from deploypipe.records import Interval
from deploypipe.search.cost_models.onnx_memory_plan import Footprint

# What a and b are before anything is measured, and how sure that is: over widths and
# batch sizes of ResNet-56 and of a ViT, a was 1.5 to 2.6 and b 2.5 to 2.9.
_USUAL, _USUAL_SPREAD = (2.0, 2.6), (1.0, 1.0)
_USUAL_ERROR = 0.03  # of the peak; stands for as many measurements as _USUAL_COUNT
_USUAL_COUNT = 2
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryModel:
    """Predicts the peak memory of files of one network on one device."""

    base_mib: float
    per_weight: float  # a
    per_activation: float  # b
    error_mib: float  # standard deviation of a file about the model
    degrees: int  # of freedom that `error_mib` has
    covariance: tuple[tuple[float, ...], ...]  # (3, 3) of base, a and b, in units of error_mib^2

    def predict(self, footprint: Footprint) -> Interval:
        """In MiB, with an interval that one more measurement lies in."""
        x = _terms(footprint)
        value = float(x @ [self.base_mib, self.per_weight, self.per_activation])
        spread = self.error_mib * sqrt(1 + float(x @ np.array(self.covariance) @ x))
        half = float(student.ppf((1 + _CONFIDENCE) / 2, self.degrees)) * spread
        return Interval(value=value, low=max(0.0, value - half), high=value + half, confidence=_CONFIDENCE)


def fit_memory(footprints: Sequence[Footprint], peaks_mib: Sequence[float]) -> MemoryModel:
    """base, a and b >= 0 from files that were measured, by least squares; one file is enough.

    What is usual for a and b enters as two more observations, so that few files, or files alike, leave them there: with
    one file only base is fitted. (Regression with a normal prior on a and b and an inverse gamma one on the error's
    variance; the covariance is that without the bound at 0.) Exact, O(files). DataError where nothing was measured.
    """
    if not footprints or len(footprints) != len(peaks_mib):
        raise DataError(
            f"{len(footprints)} footprints and {len(peaks_mib)} measured peaks were given; give one peak for each file"
        )
    peaks = np.array(peaks_mib, dtype=np.float64)
    if not (np.isfinite(peaks).all() and (peaks > 0).all()):
        raise DataError(f"the measured peaks are {[*peaks_mib]} MiB; give what measure_peak_memory found")
    x = np.array([_terms(f) for f in footprints])
    usual_error = _USUAL_ERROR * float(peaks.mean())
    stiffness = usual_error / np.array(_USUAL_SPREAD)
    rows = np.vstack([x, np.column_stack([np.zeros(2), np.diag(stiffness)])])
    coefficients, _ = nnls(rows, np.concatenate([peaks, stiffness * _USUAL]))
    squares = float(np.square(rows[: len(peaks)] @ coefficients - peaks).sum())
    degrees = _USUAL_COUNT + len(peaks) - 1  # base is fitted
    error = sqrt((_USUAL_COUNT * usual_error**2 + squares) / degrees)
    covariance = np.linalg.inv(rows.T @ rows)
    return MemoryModel(
        base_mib=float(coefficients[0]),
        per_weight=float(coefficients[1]),
        per_activation=float(coefficients[2]),
        error_mib=error,
        degrees=degrees,
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
    )


def _terms(footprint: Footprint) -> NDArray[np.float64]:
    return np.array([1.0, footprint.weight_bytes / 2**20, footprint.activation_bytes / 2**20])
