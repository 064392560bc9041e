"""Val as a search holds it: read and decoded once, in memory, or in a file if it is large."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploypipe.memory_budget import tree_bytes
from deploypipe.memory_order import Arrange
from deploypipe.networks.batch_trees import map_tensors
from deploypipe.task import Batch, map_samples, num_samples

_ALIGNMENT = 64  # bytes


def hold(batches: Iterable[Batch], most_bytes: float, folder: Path | None) -> list[Batch]:
    """All batches: the first ones in memory, and those beyond `most_bytes` in a file that ends with this process.

    The file is in `folder`, or among the system's temporary files. Its pages are memory that the system takes back
    when others need it.
    """
    held: list[Batch] = []
    file: IO[bytes] | None = None
    for batch in batches:
        most_bytes -= tree_bytes(*batch)
        if most_bytes < 0:
            file = file or tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # arrays keep the mapping alive
            inputs, target = (map_tensors(partial(_mapped, file), part) for part in batch)
            batch = inputs, target
        held.append(batch)
    return held


def _mapped(file: IO[bytes], tensor: Tensor) -> Tensor:
    """The same values at the end of the file. Written first: in a mapping a full disk would kill the process."""
    plain = tensor.contiguous()
    if not plain.nbytes:
        return plain
    place = -(-file.seek(0, 2) // _ALIGNMENT) * _ALIGNMENT
    file.seek(place)
    file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
    array = np.memmap(file, np.uint8, "r+", offset=place, shape=(plain.nbytes,))
    return torch.from_numpy(array).view(plain.dtype).view(plain.shape)


class Part(Sequence[Batch]):
    """Some samples of the held batches, picked each time that they are read."""

    def __init__(self, batches: Sequence[Batch], rows: Sequence[NDArray[np.intp]], arrange: Arrange) -> None:
        self._picked = [(batch, chosen) for batch, chosen in zip(batches, rows, strict=True) if len(chosen)]
        self._arrange = arrange
        self.num_samples = sum(len(chosen) for _, chosen in self._picked)

    def __len__(self) -> int:
        return len(self._picked)

    def __iter__(self) -> Iterator[Batch]:
        return (self._pick(*each) for each in self._picked)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self._pick(*each) for each in self._picked[index]]
        return self._pick(*self._picked[index])

    def _pick(self, batch: Batch, rows: NDArray[np.intp]) -> Batch:
        index = torch.from_numpy(rows)
        size = num_samples(batch[0])
        inputs, target = (map_samples(lambda tensor: tensor[index.to(tensor.device)], part, size) for part in batch)
        return self._arrange(inputs), target
