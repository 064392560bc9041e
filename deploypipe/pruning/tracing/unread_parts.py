"""Which parts of an axis the code reads: one example never shows what an input of another size would read.

`table[:, :n]` reads as many rows of a table of positions as the input has tokens. The other rows look like channels
that nothing needs. A split into two parts, of which both are used, reads the whole axis.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deploypipe.pruning.tracing.axis_indices import Atoms, Axis

SLICING = {"slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"}
SLICING |= {"chunk", "unsafe_chunk", "tensor_split", "narrow"}


class PartialReads:
    """Gathers, for every axis that is sliced or split, the union of the parts that are used, and whether all is."""

    def __init__(self) -> None:
        self._parts: Any = WeakIdKeyDictionary()  # tensor -> (atoms of the axis it is cut from, its own)
        self._read: dict[bytes, tuple[Atoms, set[int]]] = {}  # key of an axis -> (its atoms, those in parts in use)

        self._consumed: set[bytes] = set()  # keys of axes that something reads as a whole

    def note(self, part: Tensor, whole: Atoms, own: Atoms) -> None:
        """`part` has the atoms `own` of an axis with the atoms `whole`; it counts once it is used."""
        self._parts[part] = (whole, own)

    def use(self, tensor: Tensor) -> None:
        """An operation reads `tensor`."""
        if tensor in self._parts:
            whole, own = self._parts.pop(tensor)
            self._read.setdefault(whole.tobytes(), (whole, set()))[1].update(own.tolist())

    def consume(self, read: Iterable[Axis], written: Iterable[Axis]) -> None:
        """An operation reads axes; those that its results do not have end in it."""
        self._consumed |= _keys(read) - _keys(written)

    def is_consumed(self, whole: Atoms) -> bool:
        return whole.tobytes() in self._consumed

    def left_out(self) -> list[tuple[Atoms, Atoms]]:
        """(atoms of an axis, those of them that no part reads), for each axis of which something is left out."""
        found = []
        for whole, read in self._read.values():
            unread = np.array([atom for atom in whole.tolist() if atom not in read], dtype=np.int64)
            if len(unread):
                found.append((whole, unread))
        return found


def _keys(axes: Iterable[Axis]) -> set[bytes]:
    return {factor.atoms.tobytes() for axis in axes for factor in axis if factor.atoms is not None}
