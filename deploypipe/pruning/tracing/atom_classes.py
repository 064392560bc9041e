"""Group equal atoms into classes, and express grids in these classes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from deploypipe.pruning.tracing.index_algebra import Atoms, Grid, Indices
from deploypipe.pruning.tracing.trace_record import AxisTrace


class AtomClasses:
    """The class of every atom, the classes that must stay with the reason, and the grids between classes."""

    def __init__(self, trace: AxisTrace) -> None:
        self.of, self.kept = components(trace.indices, trace.indices.equal)
        # Two axes with one attribute (the head dimension of keys and of values) shrink together. An axis that must
        # stay is not meant by the attribute (three heads, and the three parts of a fused projection).
        self.sized = {
            place: [atoms for atoms in axes if not self.kept.keys() & set(self.of[atoms].tolist())]
            for place, axes in trace.sized.items()
        }
        ties = [(axes[0], other) for axes in self.sized.values() for other in axes[1:]]
        if ties:
            self.of, self.kept = components(trace.indices, [*trace.indices.equal, *ties])
        while more := _same_factors(trace.indices.grids, self.of):
            ties += more
            self.of, self.kept = components(trace.indices, [*trace.indices.equal, *ties])
        self.grids = [ClassGrid(grid, self.of) for grid in trace.indices.grids]
        self.as_cell: dict[int, list[tuple[ClassGrid, int]]] = defaultdict(list)
        self.as_factor: dict[int, list[tuple[ClassGrid, int, int]]] = defaultdict(list)
        for grid in self.grids:
            for cell, c in enumerate(grid.cells.reshape(-1).tolist()):
                self.as_cell[c].append((grid, cell))
            for axis, factor in enumerate(grid.factors):
                for place, c in enumerate(factor or ()):
                    self.as_factor[c].append((grid, axis, place))
        self.groups = self._all(trace.convolution_groups)
        self.heads = self._all(atoms for seen in trace.attention.values() for atoms in seen.heads)
        self.head_dims = self._all(atoms for seen in trace.attention.values() for atoms in seen.head_dims)
        self.attention: dict[int, str] = {}
        for name, seen in trace.attention.items():
            for atoms in seen.heads:
                self.attention = dict.fromkeys(self.of[atoms].tolist(), name) | self.attention

    def _all(self, arrays: Iterable[Atoms]) -> set[int]:
        return {c for atoms in arrays for c in self.of[atoms].tolist()}


def components(ledger: Indices, equal: Sequence[tuple[Atoms, Atoms]]) -> tuple[Atoms, dict[int, str]]:
    """The class of every atom, and the classes that must stay with the first reason."""
    left, right = (np.concatenate([np.zeros(0, np.int64), *(pair[i] for pair in equal)]) for i in (0, 1))
    size = max(ledger.num_atoms, 1)
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), (size, size))
    classes: Atoms = connected_components(edges, directed=False)[1].astype(np.int64)
    kept: dict[int, str] = {}
    for atoms, why in ledger.kept:
        for c in classes[atoms].tolist():
            kept.setdefault(c, why)
    return classes, kept


def _same_factors(grids: Sequence[Grid], classes: Atoms) -> list[tuple[Atoms, Atoms]]:
    """Pairs of factors that are equal because views of different tensors gave grids with the same cells."""
    first: dict[object, Grid] = {}
    found: list[tuple[Atoms, Atoms]] = []
    for grid in grids:
        known = first.setdefault((classes[grid.cells].tobytes(), tuple(f.size for f in grid.factors)), grid)
        for a, b in zip(known.factors, grid.factors, strict=True):
            if a.atoms is not None and b.atoms is not None and not np.array_equal(classes[a.atoms], classes[b.atoms]):
                found.append((a.atoms, b.atoms))
    return found


class ClassGrid:
    def __init__(self, grid: Grid, classes: Atoms) -> None:
        self.cells = classes[grid.cells].reshape([factor.size for factor in grid.factors])
        self.factors = [None if f.atoms is None else classes[f.atoms].tolist() for f in grid.factors]

    def slab(self, axis: int, place: int) -> list[int]:
        """All cells that are removed with one index of one factor."""
        return self.cells.take(place, axis=axis).reshape(-1).tolist()
