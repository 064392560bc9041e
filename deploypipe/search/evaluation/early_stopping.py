"""Accuracy on a growing part of val: who is certainly worse after the first look is not judged on the rest."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.memory_order import Arrange, as_given
from deploypipe.numerics.paired_comparison import chance_if_not_worse
from deploypipe.search.sample_results import Results
from deploypipe.task import Batch, Task, map_samples, num_samples

_SHARES = (8, 4, 2)  # one part in so many of val: a look each; the last look is at all of it
_MIN_SAMPLES = 500  # samples of the first look
_ERROR = 0.01  # chance that a trial is stopped which is no worse


def ends_of_looks(num_samples: int) -> tuple[int, ...]:
    """How many samples each look has seen, ascending; all of them at last."""
    return tuple(sorted({min(num_samples, max(_MIN_SAMPLES, num_samples // share)) for share in (*_SHARES, 1)}))


def draw_parts(val: Iterable[Batch], seed: int, arrange: Arrange = as_given) -> tuple[tuple[Batch, ...], ...]:
    """val, split into what each look adds to the one before; which samples come first follows from the seed alone.

    A sample stays among those of its own batch: batches may be of different lengths. Holds all of val in memory.
    """
    batches = [(arrange(inputs), target) for inputs, target in val]
    sizes = [num_samples(inputs) for inputs, _ in batches]
    mixed = hashlib.sha256(f"val {seed}".encode()).digest()
    places = np.random.default_rng(int.from_bytes(mixed[:8], "big")).permutation(sum(sizes))
    by_batch = np.split(places, np.cumsum(sizes)[:-1])
    parts, start = [], 0
    for end in ends_of_looks(sum(sizes)):
        chosen = [np.flatnonzero((start <= place) & (place < end)) for place in by_batch]
        parts.append(
            tuple(_pick(batch, rows, arrange) for batch, rows in zip(batches, chosen, strict=True) if len(rows))
        )
        start = end
    return tuple(parts)


def _pick(batch: Batch, rows: NDArray[np.intp], arrange: Arrange) -> Batch:
    index = torch.from_numpy(rows)
    size = num_samples(batch[0])
    inputs, target = (map_samples(lambda tensor: tensor[index.to(tensor.device)], part, size) for part in batch)
    return arrange(inputs), target


def evaluate_growing(
    make_network: Callable[[], nn.Module],
    known: Results,
    parts: Sequence[Sequence[Batch]],
    task: Task,
    is_settled: Callable[[Results], bool],
) -> Results:
    """The metric, sample by sample, on one part after the other, until it is settled or there are no more.

    known: the results of the first samples, as far as there are any; the network is made where they do not suffice.
    """
    seen, network = np.empty(0), None
    for number, part in enumerate(parts, start=1):
        end = len(seen) + sum(num_samples(inputs) for inputs, _ in part)
        if len(known) >= end:
            seen = known[:end]
        else:
            network = network or make_network()
            seen = np.concatenate([seen, evaluate_module(network, part, task)])
        if number < len(parts) and is_settled(seen):
            break
    return seen


def is_certainly_worse(seen: Results, rival: Results) -> bool:
    """Whether the first samples settle that all of val would say: worse than the rival.

    A trial that is no worse is stopped at any of its looks with a chance of at most `_ERROR`, shared among them
    (Bonferroni).
    """
    return chance_if_not_worse(seen, rival[: len(seen)]) < _ERROR / len(_SHARES)
