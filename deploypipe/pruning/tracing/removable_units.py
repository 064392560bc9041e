"""Find the units of a network: the smallest sets of indices that can be removed without any others."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from deploypipe.pruning.modules.axis_reductions import is_statistic
from deploypipe.pruning.modules.module_kinds import has_two_sides, is_stored
from deploypipe.pruning.modules.recurrent_sizes import RECURRENT, is_input_side
from deploypipe.pruning.tracing.atom_classes import AtomClasses, ClassGrid
from deploypipe.records import GroupKind, Member, Side

Place = tuple[str, Side]  # (module, side)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """The units of one producer, and everything that must shrink with them."""

    name: str
    kind: GroupKind
    num_units: int
    members: tuple[Member, ...]


def is_written(module: nn.Module, side: Side) -> bool:
    """Whether a module itself gets fewer channels when it loses indices of that side."""
    if has_two_sides(module):
        return side == "out"
    return is_stored(side) and not (isinstance(module, RECURRENT) and is_input_side(side))


@dataclass(slots=True)
class _Unit:
    classes: set[int] = field(default_factory=set)
    why_not: str = ""


class UnitFinder:
    """Collect units: the smallest sets of classes that can be removed without any others."""

    def __init__(
        self,
        classes: AtomClasses,
        places: Mapping[Place, list[int]],
        modules: Mapping[str, nn.Module],
        order: Mapping[str, int],
        *,
        take_last: bool,
    ) -> None:
        self.modules = modules
        self.classes, self.places, self.order, self.take_last = classes, places, order, take_last
        self.where: dict[int, list[tuple[Place, int]]] = defaultdict(list)
        for place, found in sorted(places.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0])):
            for index, c in enumerate(found):
                self.where[c].append((place, index))
        self.unit_of: dict[int, _Unit] = {}
        self.units = list(self._units())

    def _units(self) -> Iterator[_Unit]:
        for place in self._starts():
            for c in self.places[place]:
                if c not in self.unit_of:
                    unit = self._closure(c)
                    for each in unit.classes:
                        self.unit_of.setdefault(each, unit)
                    yield unit

    def _starts(self) -> list[Place]:
        """Places to start from, in execution order: first the outputs of layers, then the axes of all tensors.

        Otherwise a table that is added inside every head (rotary frequencies) would give head dimensions before heads.
        """
        places = [place for place in self.places if place[1] != "in" and is_stored(place[1])]
        writes = {place: place[1] == "out" and has_two_sides(self.modules[place[0]]) for place in places}
        return sorted(places, key=lambda p: (not writes[p], self.order.get(p[0], len(self.order)), p))

    def _closure(self, start: int) -> _Unit:
        """Everything that must be removed with one class."""
        unit = _Unit({start})
        todo = [start]
        while todo and not unit.why_not:
            c = todo.pop()
            unit.why_not = self.classes.kept.get(c, "")
            fresh: list[int] = []
            for grid, axis, place in self.classes.as_factor.get(c, ()):
                fresh += grid.slab(axis, place)
            for grid, cell in self.classes.as_cell.get(c, ()):
                chosen = self._choose(grid, cell, unit)
                if chosen is None:
                    unit.why_not = unit.why_not or self._why_neither(grid, cell)
                else:
                    fresh.append(chosen)
            for other in fresh:
                if other not in unit.classes:
                    unit.classes.add(other)
                    todo.append(other)
        return unit

    def _options(self, grid: ClassGrid, cell: int) -> list[int]:
        index = np.unravel_index(cell, grid.cells.shape)
        return [factor[int(i)] for factor, i in zip(grid.factors, index, strict=True) if factor]

    def _choose(self, grid: ClassGrid, cell: int, unit: _Unit) -> int | None:
        """The factor's index to remove with a cell, which cannot go alone. One that is already removed comes first."""
        options = [c for c in self._options(grid, cell) if c not in self.classes.kept]
        gone = [c for c in options if c in unit.classes]
        options = gone or (options[::-1] if self.take_last else options)
        # Prefer one filter of every group to a whole group.
        return min(options, key=lambda c: c in self.classes.groups, default=None)

    def _why_neither(self, grid: ClassGrid, cell: int) -> str:
        reasons = [self.classes.kept[c] for c in self._options(grid, cell) if c in self.classes.kept]
        return reasons[0] if reasons else "is a part of an axis that a view splits into fixed parts"

    def couplings(self) -> tuple[Coupling, ...]:
        """Units that touch the same places, grouped into couplings."""
        alike: dict[tuple[Place, ...], list[dict[Place, set[int]]]] = defaultdict(list)
        kinds: dict[tuple[Place, ...], tuple[GroupKind, str]] = {}
        for unit in self.units:
            if unit.why_not:
                continue
            touched: dict[Place, set[int]] = defaultdict(set)
            for c in unit.classes:
                for place, index in self.where.get(c, ()):
                    touched[place].add(index)
            key = tuple(sorted(touched))
            alike[key].append(touched)
            kinds.setdefault(key, self._kind(unit))
        found: list[Coupling] = []
        names: set[str] = set()
        for key, parts in alike.items():
            units = _disjoint(parts)
            if len(units) < 2 or not any(map(self._is_reader, key)):
                continue
            coupling = self._coupling(units, *kinds[key])
            while coupling.name in names:
                coupling = replace(coupling, name=f"{coupling.name}+")
            names.add(coupling.name)
            found.append(coupling)
        return tuple(found)

    def _is_reader(self, place: Place) -> bool:
        name, side = place
        tensor = getattr(self.modules[name], side.rpartition(".")[0], None)
        return side == "in" or is_statistic(side) or (side != "out" and isinstance(tensor, Tensor) and tensor.dim() > 1)

    def _kind(self, unit: _Unit) -> tuple[GroupKind, str]:
        if unit.classes & self.classes.heads:
            return "heads", self.classes.attention[min(unit.classes & self.classes.heads)]
        if unit.classes & self.classes.head_dims:
            return "head_dims", ""
        return "channels", ""

    def _coupling(self, units: Sequence[Mapping[Place, set[int]]], kind: GroupKind, module: str) -> Coupling:
        places = sorted(
            {place for unit in units for place in unit}, key=lambda p: (self.order.get(p[0], len(self.order)), p)
        )
        members = tuple(
            Member(module=name, side=side, units=tuple(tuple(sorted(unit[name, side])) for unit in units))
            for name, side in places
        )
        stored = [m for m in members if is_stored(m.side)]
        writers = [m.module for m in stored if m.side == "out"]
        others = [m.module for m in stored if m.module]  # preferred to the network itself, which may own states
        producer = [*writers, *others, stored[0].module][0]
        name = f"{module or producer}:{kind}" if kind != "channels" else producer
        return Coupling(name=name, kind=kind, num_units=len(units), members=members)

    def why_not(self, name: str) -> str:
        """Why nothing can be removed from a module with weights."""
        module = self.modules[name]
        places = [place for place in self.places if place[0] == name and is_written(module, place[1])]
        found = [c for place in places for c in self.places[place]]
        reasons = [self.unit_of[c].why_not for c in found if c in self.unit_of and self.unit_of[c].why_not]
        if reasons:
            return reasons[0]
        if has_two_sides(module) and "weight" not in module._parameters:
            return "its weight is computed by custom code (a hook?); make the result an nn.Parameter named 'weight'"
        if not found:
            return "it has a single channel" if has_two_sides(module) else "its weights have a single element each"
        unit = self.unit_of.get(found[0])
        is_read = unit is not None and any(self._is_reader(place) for c in unit.classes for place, _ in self.where[c])
        return "all its channels are coupled with each other" if is_read else "nothing reads its channels"


def _disjoint(units: Sequence[dict[Place, set[int]]]) -> list[dict[Place, set[int]]]:
    """Merge units that share an index: through a chain of shuffles one can need a part of another."""
    found: list[dict[Place, set[int]]] = []
    holder: dict[tuple[Place, int], dict[Place, set[int]]] = {}
    for unit in units:
        met = {id(holder[p, i]): holder[p, i] for p, ids in unit.items() for i in ids if (p, i) in holder}
        for other in met.values():
            unit = {place: unit[place] | other[place] for place in unit}
            found = [each for each in found if each is not other]
        found.append(unit)
        holder.update({(p, i): unit for p, ids in unit.items() for i in ids})
    return found
