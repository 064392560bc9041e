"""Hashes of the splits: a run is only resumed with the same data."""

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch

from deploypipe.networks.tree_hashes import hash_tree_
from deploypipe.task import Batch, Splits, known_length


def fingerprints(splits: Splits, see: Callable[[Any], object] = lambda _: None) -> dict[str, str]:
    """A hash of each split: all of calib and val, the first batch of test, and all lengths.

    Of train only the length counts, because its batches may differ between passes. The global generator does not
    change. see: called with the inputs of every batch of calib and val.
    """
    found = {}
    with torch.random.fork_rng(devices=[]):
        for name, split, count in (("calib", splits.calib, None), ("val", splits.val, None), ("test", splits.test, 1)):
            sha = hashlib.sha256(f"{_length(split)}\n".encode())
            for inputs, target in islice(iter(split), count):
                hash_tree_(sha, inputs)
                hash_tree_(sha, target)
                if name != "test":
                    see(inputs)
            found[name] = sha.hexdigest()[:16]
        found["train"] = _length(splits.train)
    return found


def fingerprint(splits: Splits) -> str:
    """`fingerprints` as one hash."""
    return hashlib.sha256(repr(sorted(fingerprints(splits).items())).encode()).hexdigest()[:16]


def fingerprint_of(split: Iterable[Batch]) -> str:
    """A hash of all batches of a split."""
    sha = hashlib.sha256()
    for inputs, target in split:
        hash_tree_(sha, inputs)
        hash_tree_(sha, target)
    return sha.hexdigest()[:16]


def _length(split: Iterable[Batch]) -> str:
    length = known_length(split)
    return "unknown" if length is None else str(length)
