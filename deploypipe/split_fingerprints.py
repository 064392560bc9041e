"""Hashes of the splits: a run is only resumed with the same data."""

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.networks.batch_trees import leaves
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
                _hash_into(sha, inputs)
                _hash_into(sha, target)
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
        _hash_into(sha, inputs)
        _hash_into(sha, target)
    return sha.hexdigest()[:16]


def _length(split: Iterable[Batch]) -> str:
    length = known_length(split)
    return "unknown" if length is None else str(length)


def _hash_into(sha: Any, value: Any) -> None:
    for leaf in leaves(value, ""):
        sha.update(f"{leaf.place} ".encode())
        if isinstance(tensor := leaf.value, Tensor):
            sha.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf.value, np.ndarray | np.generic):
            sha.update(f"{leaf.value.dtype} {leaf.value.shape}\n".encode() + leaf.value.tobytes())
        elif leaf.value is None or isinstance(leaf.value, bool | int | float | complex | str | bytes):
            sha.update(f"{leaf.value!r}\n".encode())
        else:  # the text of an unknown object may hold its address
            sha.update(f"{type(leaf.value).__qualname__}\n".encode())
