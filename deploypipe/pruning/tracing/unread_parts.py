"""Find the parts of an axis that the code does not read with these inputs, and may read with others.

One example never shows what an input of another size would read. `table[:, :n]` reads as many rows of a position table
as the input has tokens. The other rows look like channels that nothing needs. A split into two parts that are both used
reads the whole axis.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deploypipe.pruning.tracing.index_algebra import Atoms, Axis

SLICING = {"slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"}
SLICING |= {"chunk", "unsafe_chunk", "tensor_split", "narrow"}


class PartialReads:
    """For every axis that is sliced or split: the union of the parts that are used."""

    def __init__(self) -> None:
        self._parts: Any = WeakIdKeyDictionary()  # tensor -> (atoms of the axis it was cut from, its own atoms)
        self._read: dict[bytes, tuple[Atoms, set[int]]] = {}  # key of an axis -> (its atoms, the atoms read)

        self._consumed: set[bytes] = set()  # keys of axes that something reads as a whole

    def note(self, part: Tensor, whole: Atoms, own: Atoms) -> None:
        """`part` has the atoms `own` of an axis with the atoms `whole`. It counts as read once it is used."""
        self._parts[part] = (whole, own)

    def use(self, tensor: Tensor) -> None:
        """An operation reads `tensor`."""
        if tensor in self._parts:
            whole, own = self._parts.pop(tensor)
            self._read.setdefault(whole.tobytes(), (whole, set()))[1].update(own.tolist())

    def consume(self, read: Iterable[Axis], written: Iterable[Axis]) -> None:
        """An operation reads axes. Those that its results do not have are consumed as a whole."""
        self._consumed |= _keys(read) - _keys(written)

    def is_consumed(self, whole: Atoms) -> bool:
        return whole.tobytes() in self._consumed

    def left_out(self) -> list[tuple[Atoms, Atoms]]:
        """(atoms of an axis, the atoms that no part reads), for each axis that is read only in part."""
        found = []
        for whole, read in self._read.values():
            unread = np.array([atom for atom in whole.tolist() if atom not in read], dtype=np.int64)
            if len(unread):
                found.append((whole, unread))
        return found


def _keys(axes: Iterable[Axis]) -> set[bytes]:
    return {factor.atoms.tobytes() for axis in axes for factor in axis if factor.atoms is not None}
