"""Evaluate accuracy on a growing part of val, and stop a candidate that is certainly worse than another."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from deploypipe.benchmark.accuracy import evaluate
from deploypipe.benchmark.forward_passes import Passes
from deploypipe.memory_order import Arrange, as_given
from deploypipe.numerics.paired_comparison import chance_if_not_worse
from deploypipe.search.evaluation.held_val import Part, hold
from deploypipe.search.sample_results import Results
from deploypipe.task import Batch, Task, num_samples

_SHARES = (8, 4, 2)  # interim tests see 1/8, 1/4 and 1/2 of val; the last evaluation sees all of it
_MIN_SAMPLES = 500  # of the first interim test
_MAX_ERROR = 0.01  # chance that a trial is stopped although it is no worse


def interim_sample_counts(num_samples: int) -> tuple[int, ...]:
    """How many samples each interim test has seen, ascending; the last number is all of them."""
    return tuple(sorted({min(num_samples, max(_MIN_SAMPLES, num_samples // share)) for share in (*_SHARES, 1)}))


def draw_parts(
    val: Iterable[Batch],
    seed: int,
    arrange: Arrange = as_given,
    *,
    most_bytes: float = math.inf,
    folder: Path | None = None,
) -> tuple[Part, ...]:
    """Split val into the parts that the interim tests add one after the other; the seed alone decides the order.

    A sample stays with those of its own batch, since batches may have different lengths. Val is read once. What of it
    exceeds `most_bytes` is held in a file in `folder` (`held_val.hold`).
    """
    batches = hold(val, most_bytes, folder)
    sizes = [num_samples(inputs) for inputs, _ in batches]
    mixed = hashlib.sha256(f"val {seed}".encode()).digest()
    places = np.random.default_rng(int.from_bytes(mixed[:8], "big")).permutation(sum(sizes))
    by_batch = np.split(places, np.cumsum(sizes)[:-1])
    parts, start = [], 0
    for end in interim_sample_counts(sum(sizes)):
        chosen = [np.flatnonzero((start <= place) & (place < end)) for place in by_batch]
        parts.append(Part(batches, chosen, arrange))
        start = end
    return tuple(parts)


def evaluate_growing(
    open_network: Callable[[], Passes],
    known: Results,
    parts: Sequence[Part],
    task: Task,
    is_settled: Callable[[Results], bool],
) -> Results:
    """Return the metric of each sample, part by part, until `is_settled` or no part is left.

    known: results of the first samples from the cache, possibly none. Only if they do not suffice, the network is
    opened.
    """
    seen, passes = np.empty(0), None
    for number, part in enumerate(parts, start=1):
        end = len(seen) + part.num_samples
        if len(known) >= end:
            seen = known[:end]
        else:
            passes = passes or open_network()
            seen = np.concatenate([seen, evaluate(passes, part, task, "a candidate")])
        if number < len(parts) and is_settled(seen):
            break
    return seen


def is_certainly_worse(seen: Results, rival: Results) -> bool:
    """Whether the first samples show that the network is worse than the rival on all of val.

    A trial that is no worse is stopped with a chance of at most `_MAX_ERROR` in all its interim tests together
    (Bonferroni).
    """
    return chance_if_not_worse(seen, rival[: len(seen)]) < _MAX_ERROR / len(_SHARES)
