"""A split that notes its hash and its slices while it is read for something else: reading may cost more than both."""

import hashlib
from collections.abc import Iterable, Iterator

from deploypipe.networks.tree_hashes import hash_tree_
from deploypipe.task import Batch, Slices, find_slices, num_samples


class DescribedSplit:
    """The batches of a split. The first whole pass sets `digest` and `slices`, which are empty before.

    digest: as `split_fingerprints.fingerprint_of`; slices: as `task.find_slices`.
    """

    def __init__(self, split: Iterable[Batch], slices: Slices | None) -> None:
        self._split, self._slices_of = split, slices
        self.digest = ""
        self.slices: dict[str, tuple[int, ...]] = {}

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._split) if self.digest else self._noted()

    def _noted(self) -> Iterator[Batch]:
        sha, found, start = hashlib.sha256(), dict[str, list[int]](), 0
        for inputs, target in self._split:
            hash_tree_(sha, inputs)
            hash_tree_(sha, target)
            for name, rows in find_slices([(inputs, target)], self._slices_of).items():
                found.setdefault(name, []).extend(start + row for row in rows)
            start += num_samples(inputs)
            yield inputs, target
        self.digest = sha.hexdigest()[:16]
        self.slices = {name: tuple(found[name]) for name in sorted(found)}
