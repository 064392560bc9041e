"""Whether an exported file computes what the network computes, on the user's own batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploypipe.errors import DataError, ParityError
from deploypipe.runtimes import Array, Session
from deploypipe.runtimes.packing import feed


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far a file is from the network it was exported from."""

    max_abs_error: float  # relative to the largest magnitude of the same output over all batches; the worst output's
    top1_agreement: float | None  # share of samples, for a first output (n, classes); else None


def measure_parity(session: Session, inputs: Sequence[Any], expected: Sequence[Sequence[Array]]) -> Parity:
    """Run `session` on each of `inputs` and compare with `expected[batch][output]`, the network's own outputs.

    Raises DataError where the network's outputs are not finite, ParityError where shapes or types differ.
    """
    num_outputs = len(expected[0])
    errors, largest, agreements = np.zeros(num_outputs), np.zeros(num_outputs), []
    for batch, wanted in zip(inputs, expected, strict=True):
        seen = session.run(feed(batch, session.input_names))
        for i, (name, want, got) in enumerate(zip(session.output_names, wanted, seen, strict=True)):
            if want.shape != got.shape or want.dtype != got.dtype:
                raise ParityError(
                    f"output {name!r} is {got.dtype}{list(got.shape)} in the file and {want.dtype}{list(want.shape)} "
                    "in the network; the shape must depend on nothing but the batch size"
                )
            if not np.isfinite(want).all():
                raise DataError(f"the network's output {name!r} holds NaN or infinity; check its weights and its data")
            errors[i] = max(errors[i], np.abs(want.astype(np.float64) - got).max(initial=0))
            largest[i] = max(largest[i], np.abs(want).max(initial=0))
        if wanted[0].ndim == 2 and wanted[0].shape[1] > 1:
            agreements.append(wanted[0].argmax(axis=1) == seen[0].argmax(axis=1))
    relative = errors / np.where(largest > 0, largest, 1)
    return Parity(
        max_abs_error=float(relative.max()),  # NaN in the file stays NaN here
        top1_agreement=float(np.concatenate(agreements).mean()) if agreements else None,
    )


def require_parity(parity: Parity, limit: float, path: Path) -> None:
    """ParityError with the figures where the error is above `limit`, or not a number."""
    if parity.max_abs_error <= limit:
        return
    top1 = "" if parity.top1_agreement is None else f", top-1 agreement {parity.top1_agreement:.2%}"
    raise ParityError(
        f"{path.name}: differs from the network by {parity.max_abs_error:.3g} of its largest output{top1}; allowed is "
        f"{limit:.3g}: look for randomness or state in forward(), or raise export.max_abs_error"
    )
