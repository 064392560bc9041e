"""Collect histograms and means of an ONNX graph's inner tensors on real samples, a few samples at a time.

onnxruntime's own calibrators are not used: they hold the tensors of all samples in memory and run the samples once for
each method, and their entropy method, with its default bins, has only one threshold to choose from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from deploypipe.errors import DataError
from deploypipe.export.quantization.run_and_compare_graphs import Feed, read_tensors
from deploypipe.numerics.int8_range import ClippingMethod, clip_range

Range = tuple[float, float]

_NUM_BINS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """The values of one tensor: counts (bins,) over equal bins of [low, high], and the mean of each channel."""

    counts: NDArray[np.int64]
    low: float
    high: float
    means: NDArray[np.float64]


def observe_tensors(
    proto: onnx.ModelProto, channel_axes: Mapping[str, int], inputs: Sequence[Feed], path: Path
) -> dict[str, Histogram]:
    """Collect a histogram of each tensor in `channel_axes` (name -> axis of the means).

    The samples are run twice, since the ends of the bins come first. DataError if a tensor is not finite.
    """
    names = sorted(channel_axes)
    ends = _find_ends(names, read_tensors(proto, names, inputs, path), path)
    counts = {name: np.zeros(_NUM_BINS, dtype=np.int64) for name in names}
    sums: dict[str, NDArray[np.float64]] = {}
    sizes = dict.fromkeys(names, 0)
    for arrays in read_tensors(proto, names, inputs, path):
        for name, array in arrays.items():
            low, high = ends[name]
            axis = channel_axes[name] % array.ndim
            others = tuple(i for i in range(array.ndim) if i != axis)
            sums[name] = sums.get(name, 0.0) + array.sum(axis=others, dtype=np.float64)
            sizes[name] += array.size // array.shape[axis]
            if high > low:
                scaled = (array.ravel() - np.float32(low)) * np.float32(_NUM_BINS / (high - low))
                bins = np.minimum(scaled.astype(np.int32), _NUM_BINS - 1)
                counts[name] += np.bincount(bins, minlength=_NUM_BINS)
    return {
        name: Histogram(counts=counts[name], low=low, high=high, means=sums[name] / sizes[name])
        for name, (low, high) in ends.items()
    }


def ranges_by(method: ClippingMethod, histograms: Mapping[str, Histogram]) -> dict[str, Range]:
    """By tensor: the range that `method` chooses to round to 8 bits."""
    return {name: clip_range(method, h.counts, h.low, h.high) for name, h in histograms.items()}


def _find_ends(names: Sequence[str], parts: Iterable[dict[str, NDArray[np.float32]]], path: Path) -> dict[str, Range]:
    ends: dict[str, Range] = {}
    for arrays in parts:
        for name in names:
            low, high = float(arrays[name].min()), float(arrays[name].max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(
                    f"{path}: tensor {name!r} holds NaN or infinity on a calibration sample; check the inputs"
                )
            before = ends.get(name, (low, high))
            ends[name] = min(before[0], low), max(before[1], high)
    return ends
