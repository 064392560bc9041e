"""Indices of axes, and which of them are the same: the algebra that finds coupled layers.

An atom is one removable index, such as output channel 3 of a convolution. An axis of a tensor is a row-major product of
factors: `view(n, heads, dim)` splits one factor in two, `flatten` joins several into one axis. Three kinds of facts are
collected during a forward pass:
- atoms that are equal (two operands of an addition);
- grids (index h * dim + d exists as long as head h and dimension d do);
- atoms that must stay, each with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploypipe.pruning.modules.module_attributes import Origin

Atoms = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    size: int  # 2 or more
    atoms: Atoms | None = None  # None: nothing here can be removed
    is_free: bool = False  # without atoms: a broadcast or a factory made it to fit, so it forbids nothing
    origin: Origin | None = None  # of a free factor: the attribute that holds its size


Axis = tuple[Factor, ...]  # () has size 1
Axes = tuple[Axis, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """cells[i1, ..., ik] is removed when the index of one factor is, and never alone."""

    cells: Atoms  # flat, row-major
    factors: Axis


def size_of(axis: Axis) -> int:
    return math.prod(factor.size for factor in axis)


def fixed(size: int, *, is_free: bool = False, origin: Origin | None = None) -> Axis:
    """An axis on which nothing can be removed."""
    return (Factor(size, None, is_free, origin),) if size != 1 else ()


def has_atoms(axis: Axis) -> bool:
    return any(factor.atoms is not None for factor in axis)


class Indices:
    """All atoms of one trace and the facts known about them."""

    def __init__(self) -> None:
        self.num_atoms = 0
        self.equal: list[tuple[Atoms, Atoms]] = []
        self.grids: list[Grid] = []
        self.kept: list[tuple[Atoms, str]] = []  # atoms that must stay, and why
        self.counted: list[tuple[Origin, Atoms]] = []  # attribute that sized an axis, and its atoms
        self._joined: dict[object, Factor] = {}  # factors -> their cells
        self._parts: dict[object, Axis] = {}  # cells and sizes -> their factors

    def new(self, size: int) -> Axis:
        """A new axis with a new atom for each index."""
        return (self._fresh(size),) if size > 1 else ()

    def _fresh(self, size: int) -> Factor:
        self.num_atoms += size
        return Factor(size, np.arange(self.num_atoms - size, self.num_atoms, dtype=np.int64))

    def keep(self, axis: Axis, why: str) -> None:
        self.kept += [(factor.atoms, why) for factor in axis if factor.atoms is not None]

    def equate(self, a: Axis, b: Axis, why: str) -> Axis:
        """The axis of a result whose operands have `a` and `b` there. An axis of size 1 is broadcast.

        why: the reason to keep the atoms of one if the other has none.
        """
        if not a or not b:
            return a or b
        if [f.size for f in a] != [f.size for f in b]:
            a, b = (self.joined(a),), (self.joined(b),)
        return tuple(self._equate(x, y, why) for x, y in zip(a, b, strict=True))

    def _equate(self, a: Factor, b: Factor, why: str) -> Factor:
        if a.atoms is not None and b.atoms is not None:
            if a.atoms is not b.atoms:
                self.equal.append((a.atoms, b.atoms))
            return a
        for one, other in ((a, b), (b, a)):
            if one.atoms is not None:
                if other.origin is not None:
                    self.counted.append((other.origin, one.atoms))
                elif not other.is_free:
                    self.kept.append((one.atoms, why))
                return one
        return b if a.is_free and (a.origin is None or not b.is_free) else a

    def joined(self, axis: Axis) -> Factor:
        """The axis (of size 2 or more) as one factor: the cells of a grid if it has several."""
        axis = _merge_atomless(axis)
        if len(axis) == 1:
            return axis[0]
        key = tuple(_key(factor) for factor in axis)
        if key not in self._joined:
            (cells,) = self.new(size_of(axis))
            self._add_grid(cells, axis)
        return self._joined[key]

    def split(self, factor: Factor, sizes: Sequence[int]) -> Axis:
        """Split a factor into factors of these sizes."""
        sizes = [size for size in sizes if size > 1]
        if len(sizes) == 1:
            return (factor,)
        if factor.atoms is None:
            return tuple(Factor(size, None, factor.is_free) for size in sizes)
        key = (_key(factor), tuple(sizes))
        if key not in self._parts:
            self._add_grid(factor, tuple(f for size in sizes for f in self.new(size)))
        return self._parts[key]

    def _add_grid(self, cells: Factor, factors: Axis) -> None:
        assert cells.atoms is not None
        self.grids.append(Grid(cells.atoms, factors))
        self._joined[tuple(_key(factor) for factor in factors)] = cells
        self._parts[_key(cells), tuple(factor.size for factor in factors)] = factors

    def reshape(self, axes: Axes, sizes: Sequence[int], why: str) -> Axes:
        """The axes after a view with these sizes. If they do not divide evenly, all axes stay, with reason `why`."""
        factors = tuple(factor for axis in axes for factor in axis)
        found = self._regrouped(_merge_atomless(factors, keeps_origins=True), sizes)
        found = self._regrouped(_merge_atomless(factors), sizes) if found is None else found
        if found is not None:
            return found
        for axis in axes:
            self.keep(axis, why)
        return tuple(fixed(n) for n in sizes)

    def _regrouped(self, factors: Axis, sizes: Sequence[int]) -> Axes | None:
        """The factors distributed over the sizes; None if a boundary does not divide a factor evenly."""
        left = list(factors)
        result: list[Axis] = []
        for size in sizes:
            taken: list[Factor] = []
            while size > 1:
                factor = left.pop(0)
                share = math.gcd(size, factor.size)
                if share == 1:
                    return None
                head, *tail = self.split(factor, (share, factor.size // share))
                taken.append(head)
                left[:0] = tail
                size //= share
            result.append(tuple(taken))
        return tuple(result)

    def concatenate(self, parts: Sequence[Axis], sizes: Sequence[int], why: str) -> Axis:
        if not any(map(has_atoms, parts)):
            return fixed(sum(sizes), is_free=all(f.is_free for part in parts for f in part))
        atoms = []
        for part, size in zip(parts, sizes, strict=True):
            if not has_atoms(part):  # a constant or a single channel among removable channels
                origin = part[0].origin if len(part) == 1 else None
                part = (self._fresh(size),)
                if origin is None:
                    self.keep(part, why)
                else:  # the code made it with a size from an attribute
                    self.equate(part, fixed(size, is_free=True, origin=origin), why)
            factor = self.joined(part)
            assert factor.atoms is not None
            atoms.append(factor.atoms)
        return (Factor(sum(sizes), np.concatenate(atoms)),)

    def pick(self, axis: Axis, places: Atoms) -> Axis:
        """The indices at `places` of the axis, in that order."""
        if not has_atoms(axis):
            return fixed(len(places))
        factor = self.joined(axis)
        assert factor.atoms is not None
        return (Factor(len(places), factor.atoms[places]),) if len(places) > 1 else self._single(factor.atoms[places])

    def _single(self, atoms: Atoms) -> Axis:
        self.kept.append((atoms, "is picked out by the code"))
        return ()


def _merge_atomless(axis: Axis, *, keeps_origins: bool = False) -> Axis:
    """Merge neighbouring factors without atoms, so that equal axes have equal factors."""
    merged: list[Factor] = []
    for factor in axis:
        is_known = keeps_origins and (factor.origin or (merged and merged[-1].origin))
        if merged and merged[-1].atoms is None and factor.atoms is None and not is_known:
            last = merged.pop()
            factor = Factor(last.size * factor.size, None, last.is_free and factor.is_free)
        merged.append(factor)
    return tuple(merged)


def _key(factor: Factor) -> object:
    return factor.size if factor.atoms is None else factor.atoms.tobytes()
