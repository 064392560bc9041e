"""A little of each split is read twice: sizes, labels, NaN, and whether the order stays."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deploypipe.errors import DataError, DeploypipeError
from deploypipe.task import Batch, empty_split, has_batch_axis, num_samples, take_batch
from deploypipe.trees import leaves
from deploypipe.user_code import GuardedSplit, digest_of, order_error


@dataclass
class Survey:
    """What one pass over a split found, or over its first batches where all of them would take too long."""

    first: Batch
    sizes: list[int] = field(default_factory=list)  # of the batches
    is_whole: bool = True
    labels: tuple[float, float] | None = None  # the least and the largest, where targets are class numbers
    suspect: tuple[int, Batch] | None = None  # a batch's number and its first sample that holds NaN
    digests: list[bytes] = field(default_factory=list)

    def __str__(self) -> str:
        count = f"{sum(self.sizes)}{'' if self.is_whole else '+'} samples in {len(self.sizes)} batches"
        return f"{count} of {min(self.sizes)} to {max(self.sizes)}" if len(set(self.sizes)) > 1 else count


def survey(split: GuardedSplit, seconds: float) -> Survey:
    """Read a split for about so long; DataError where it is empty or comes in another order the second time."""
    found = _read(split, seconds)
    if split.name != "train":
        _compare(split, found, seconds)
    return found


def _read(split: GuardedSplit, seconds: float) -> Survey:
    found: Survey | None = None
    begun = time.perf_counter()
    with _seeded(0):
        for number, batch in enumerate(split):
            size = num_samples(batch[0])
            if found is None:
                if not size:
                    raise empty_split(split.name)
                found = Survey(first=batch)
            elif time.perf_counter() - begun > seconds:
                found.is_whole = False
                break
            found.sizes.append(size)
            if split.name != "train":
                found.digests.append(digest_of(batch))
            found.labels = _widened(found.labels, batch[1])
            if found.suspect is None and size:
                found.suspect = _suspect(batch, number, size)
    if found is None:
        raise empty_split(split.name)
    return found


def _compare(split: GuardedSplit, found: Survey, seconds: float) -> None:
    begun = time.perf_counter()
    number = -1
    with _seeded(1):  # else a loader that shuffles by the global generator would look as if it did not
        for number, batch in enumerate(split):
            if number >= len(found.digests):
                break
            if digest_of(batch) != found.digests[number]:
                raise order_error(split.name, number)
            if time.perf_counter() - begun > seconds:
                return
    if number + 1 < len(found.digests):
        raise DataError(
            f"the {split.name} split gives {len(found.digests)} batches in a first pass and {number + 1} in a second; "
            "give something that can be iterated again and again: TensorBatches, a DataLoader or a list"
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _widened(known: tuple[float, float] | None, target: Any) -> tuple[float, float] | None:
    if not isinstance(target, Tensor) or not target.numel() or target.is_floating_point() or target.is_complex():
        return known
    least, largest = float(target.min()), float(target.max())
    return (min(known[0], least), max(known[1], largest)) if known else (least, largest)


def _suspect(batch: Batch, number: int, size: int) -> tuple[int, Batch] | None:
    """Masks hold minus infinity; NaN and plus infinity are rarely meant."""
    for leaf in leaves(batch, ""):
        value = leaf.value
        if not isinstance(value, Tensor) or not value.is_floating_point() or not has_batch_axis(value, size):
            continue
        total = float(value.detach().sum())
        if math.isfinite(total):
            continue
        odd = (value.isnan() | (value == math.inf)).reshape(size, -1).any(dim=1).nonzero()
        if len(odd):
            place = int(odd[0])
            return number, take_batch(batch, place + 1, place)
    return None


def check_labels(target: Any, split: str, num_classes: int, labels: tuple[float, float] | None) -> None:
    """DataError where these are no targets for `classification()`; `labels`: the least and largest of the split."""
    problem = _problem_of_labels(target)
    if problem:
        raise DataError(f"classification() needs class numbers, and the {split} split gives {problem}")
    if labels and (labels[0] < 0 or labels[1] >= num_classes):
        raise DataError(
            f"the {split} split has labels from {labels[0]:.0f} to {labels[1]:.0f}, and the network {num_classes} "
            f"outputs; number them from 0 to {num_classes - 1}, or give the network more outputs"
        )


def _problem_of_labels(target: Any) -> str:
    if not isinstance(target, Tensor):
        some = next((leaf.value for leaf in leaves(target)), None)
        if isinstance(some, str):
            return f"text ({some!r:.20}); number the names: torch.tensor([names.index(name) for name in labels])"
        return f"a {type(target).__name__}; write torch.tensor(labels)"
    kind, shape = str(target.dtype), list(target.shape)
    if target.dim() == 2 and target.shape[1] > 1:
        return f"{kind} of shape {shape}, one-hot; write y.argmax(dim=1)"
    if target.dim() != 1:
        return f"{kind} of shape {shape}; give one number for each sample: y.flatten()"
    if target.is_floating_point() or target.is_complex():
        return f"{kind}; write y.long()"
    return ""


def fewest_samples(found: Survey, split: str) -> DeploypipeError | None:
    """An error where a split has fewer samples than an interval or a score's stability needs."""
    if not found.is_whole or sum(found.sizes) >= 2:
        return None
    return DataError(
        f"the {split} split has one sample, and no interval can be had from it; give 2 or more, for a decision hundreds"
    )
