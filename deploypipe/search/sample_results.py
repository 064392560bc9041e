"""Results of one network for each sample, and their text form for caches and databases."""

import base64
import zlib
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Results: TypeAlias = NDArray[np.float64]  # (samples,) of the task's metric, in the order in which they were drawn


def encode_results(results: Results) -> str:
    """Write results as text: one bit for each sample if all are 0 or 1, else their exact floats."""
    if np.isin(results, (0.0, 1.0)).all():
        kind, content = "bits", np.packbits(results.astype(bool)).tobytes()
    else:
        kind, content = "float64", results.astype("<f8").tobytes()
    return f"{kind} {len(results)} {base64.b64encode(zlib.compress(content)).decode()}"


def decode_results(text: str) -> Results:
    """Read what `encode_results` wrote."""
    kind, count, content = text.split()
    raw = zlib.decompress(base64.b64decode(content))
    if kind == "bits":
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=int(count)).astype(np.float64)
    return np.frombuffer(raw, dtype="<f8").astype(np.float64)
