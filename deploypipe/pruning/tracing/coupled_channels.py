"""Which channels, heads and features can only be removed together."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.surgery.hook_computed_weights import make_plain_
from deploypipe.pruning.surgery.module_slicing import (
    forget_caches_,
    has_two_sides,
    is_depthwise,
    is_stored,
    out_tensor,
)
from deploypipe.pruning.surgery.recurrent_layers import RECURRENT, is_input_side
from deploypipe.pruning.tracing.axis_indices import Atoms, Grid, Indices
from deploypipe.pruning.tracing.axis_reductions import is_statistic
from deploypipe.pruning.tracing.index_propagation import Propagation
from deploypipe.pruning.tracing.module_attributes import mark_sizes_
from deploypipe.pruning.tracing.module_calls import evaluating, output_tensors
from deploypipe.records import Frozen, GroupKind, Member, Side
from deploypipe.task import forward

_Place = tuple[str, Side]  # (module, side)
_KNOWN = {"weight", "bias", "running_mean", "running_var"}  # a known layer's sides stand for these


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """The units of one producer and everything that must shrink with them."""

    name: str
    kind: GroupKind
    num_units: int
    members: tuple[Member, ...]


def trace_groups(
    model: nn.Module, batches: Sequence[Any], order: Mapping[str, int], as_wide: Collection[str] = ()
) -> tuple[tuple[Coupling, ...], tuple[Coupling, ...], tuple[Frozen, ...]]:
    """Couplings in execution order, others to try where one of them fails, and producers that cannot shrink, with why.

    batches: inputs of the network, of several sizes: what any of them couples or reads counts. order: module name ->
    place in the execution order; modules absent from it are never called. Works on a copy of `model`. The others differ
    where a view splits an axis in two that can both shrink: couplings take the first of them (whole heads), the others
    the last (dimensions of every head). as_wide: see `Propagation`.
    """
    try:
        trace = _propagate(model, batches, as_wide)
    except Exception as error:  # a forward() that cannot run in inference mode may raise anything
        raise_if_exhausted(error)
        reason = f"could not be traced: {type(error).__name__}: {error}"
        modules = with_weights(dict(model.named_modules()))
        return (), (), tuple(_row(name, module, reason) for name, module in modules.items())
    classes = _Classes(trace)
    places = _places(trace, classes)
    first = _Finder(classes, places, trace.modules, order, take_last=False)
    last = _Finder(classes, places, trace.modules, order, take_last=True)
    couplings, others = first.couplings(), last.couplings()
    known = {c.members for c in couplings}
    losing = {name for c in couplings for name in losers(c, trace.modules)}
    frozen = [
        _row(name, module, first.why_not(name))
        for name, module in with_weights(trace.modules).items()
        if name not in losing
    ]
    return couplings, tuple(c for c in others if c.members not in known), tuple(frozen)


def with_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules with parameters of their own, and layers whose weights are computed."""
    return {
        name: module
        for name, module in modules.items()
        if has_two_sides(module) or next(module.parameters(recurse=False), None) is not None
    }


def losers(coupling: Coupling, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules with weights that lose some: of layers that read and write channels those that write fewer."""
    return list(dict.fromkeys(m.module for m in coupling.members if _is_written(modules[m.module], m.side)))


def _is_written(module: nn.Module, side: Side) -> bool:
    """Whether a module has fewer channels of its own once it loses indices of that side."""
    if has_two_sides(module):
        return side == "out"
    return is_stored(side) and not (isinstance(module, RECURRENT) and is_input_side(side))


def freeze(coupling: Coupling, reason: str, modules: Mapping[str, nn.Module]) -> list[Frozen]:
    """A row for every module that would lose weights by a coupling that must stay."""
    because = f"shares its channels with {coupling.name!r}, which stays"
    names = [name for name in losers(coupling, modules) if name != coupling.name]
    rows = [_row(name, modules[name], because) for name in names]
    return [Frozen(name=coupling.name, kind=coupling.kind, reason=reason), *rows]


def _row(name: str, module: nn.Module, reason: str) -> Frozen:
    """A network with parameters of its own goes by its class."""
    if has_two_sides(module):
        return Frozen(name=name, kind="channels", reason=reason)
    return Frozen(name=name or type(module).__name__, kind="weights", reason=reason)


def _propagate(model: nn.Module, batches: Sequence[Any], as_wide: Collection[str]) -> Propagation:
    copy = copied(model)
    forget_caches_(copy)
    make_plain_(copy.modules())
    mark_sizes_(copy)
    with torch.inference_mode():
        trace = Propagation(copy, batches, as_wide)
        for name, module in copy.named_modules():
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, name=name: trace.enter(name, [*args, *kwargs.values()]), with_kwargs=True
            )
            module.register_forward_hook(lambda *_: trace.leave())
        with evaluating(copy), trace.calls, trace:
            outputs = [forward(copy, inputs) for inputs in batches]
    for place, atoms in trace.indices.counted:
        trace.sized.setdefault(place, []).append(atoms)
    written = [axis for tensor in output_tensors(outputs) for axis in trace.of(tensor)]
    trace.indices.kept[:0] = [
        (f.atoms, "its channels are the network's output") for axis in written for f in axis if f.atoms is not None
    ]
    _keep_unread(trace)
    return trace


def _keep_unread(trace: Propagation) -> None:
    """Keep what this example leaves unread and an input of another size or kind may read."""
    for tensor in {id(t): t for own in trace.stored.values() for t in own.values()}.values():
        if id(tensor) not in trace.used:
            for axis in trace.of(tensor):
                trace.indices.keep(axis, "is not read with these inputs, and may be with others")
    partial = trace.partial.left_out()
    if not partial:
        return
    classes, _ = _components(trace.indices, trace.indices.equal)
    written: set[int] = set()
    for name in trace.called & {name for name, module in trace.modules.items() if out_tensor(module)}:
        local, number = out_tensor(trace.modules[name]) or ("", 0)
        for factor in trace.of(getattr(trace.modules[name], local))[number]:
            written.update(classes[factor.atoms].tolist() if factor.atoms is not None else ())
    for whole, unread in partial:
        # Of a layer's channels the rest is kept, where nothing reads it. A table's length may be that of the input.
        is_written = not written.isdisjoint(classes[whole].tolist())
        if is_written and trace.partial.is_consumed(whole):
            continue
        why = "is read in part only with these inputs, and others may read more of it"
        trace.indices.kept.append((unread if is_written else whole, why))


class _Classes:
    """Atoms that are equal, as numbers of their class; what must stay, and why; and the grids between classes."""

    def __init__(self, trace: Propagation) -> None:
        self.of, self.kept = _components(trace.indices, trace.indices.equal)
        # One attribute for two axes (the head dimension of keys and of values): they shrink together. An axis that
        # must stay is not what it is for (three heads, and the three parts of a fused projection).
        self.sized = {
            place: [atoms for atoms in axes if not self.kept.keys() & set(self.of[atoms].tolist())]
            for place, axes in trace.sized.items()
        }
        ties = [(axes[0], other) for axes in self.sized.values() for other in axes[1:]]
        if ties:
            self.of, self.kept = _components(trace.indices, [*trace.indices.equal, *ties])
        while more := _same_factors(trace.indices.grids, self.of):
            ties += more
            self.of, self.kept = _components(trace.indices, [*trace.indices.equal, *ties])
        self.grids = [_ClassGrid(grid, self.of) for grid in trace.indices.grids]
        self.as_cell: dict[int, list[tuple[_ClassGrid, int]]] = defaultdict(list)
        self.as_factor: dict[int, list[tuple[_ClassGrid, int, int]]] = defaultdict(list)
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


def _components(ledger: Indices, equal: Sequence[tuple[Atoms, Atoms]]) -> tuple[Atoms, dict[int, str]]:
    """The class of every atom, and the classes that must stay, with the first reason."""
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
    """Factors of grids with the same cells, which views of different tensors made, where they are not yet equal."""
    first: dict[object, Grid] = {}
    found: list[tuple[Atoms, Atoms]] = []
    for grid in grids:
        known = first.setdefault((classes[grid.cells].tobytes(), tuple(f.size for f in grid.factors)), grid)
        for a, b in zip(known.factors, grid.factors, strict=True):
            if a.atoms is not None and b.atoms is not None and not np.array_equal(classes[a.atoms], classes[b.atoms]):
                found.append((a.atoms, b.atoms))
    return found


class _ClassGrid:
    def __init__(self, grid: Grid, classes: Atoms) -> None:
        self.cells = classes[grid.cells].reshape([factor.size for factor in grid.factors])
        self.factors = [None if f.atoms is None else classes[f.atoms].tolist() for f in grid.factors]

    def slab(self, axis: int, place: int) -> list[int]:
        """All cells that go with one index of one factor."""
        return self.cells.take(place, axis=axis).reshape(-1).tolist()


def _places(trace: Propagation, classes: _Classes) -> dict[_Place, list[int]]:
    """The class of every index of everything that can be cut: sides of layers, axes of tensors, sizes in attributes."""
    places: dict[_Place, list[int]] = {}

    def add(module: str, side: Side, atoms: Atoms | None) -> None:
        if atoms is not None:
            places.setdefault((module, side), classes.of[atoms].tolist())

    for name, module in trace.modules.items():
        covered = out_tensor(module)
        for side, atoms in _tensor_sides(trace, name, covered):
            add(name, side, atoms)
        if covered and has_two_sides(module):
            add(name, "in", trace.reads.get(name))
        if name in trace.normalises and not is_depthwise(module):
            add(name, "out", trace.normalises[name])
    for (name, attribute), axes in classes.sized.items():
        if axes and out_tensor(trace.modules[name]) is None:  # known layers count by themselves
            add(name, f"@{attribute}", axes[0])
    for (name, side), atoms in trace.statistics.items():
        add(name, side, atoms)
    return places


def _tensor_sides(
    trace: Propagation, name: str, covered: tuple[str, int] | None
) -> Iterator[tuple[Side, Atoms | None]]:
    """The axes of a module's own tensors; of a known layer its outputs stand for all of them."""
    for local, tensor in trace.stored[name].items():
        for number, axis in enumerate(trace.of(tensor)):
            atoms = axis[0].atoms if axis else None
            if covered == (local, number):
                yield "out", atoms
            elif not covered or local not in _KNOWN or (isinstance(trace.modules[name], nn.Embedding) and number == 0):
                yield f"{local}.{number}", atoms


@dataclass(slots=True)
class _Unit:
    classes: set[int] = field(default_factory=set)
    why_not: str = ""


class _Finder:
    """Collects units: the least sets of classes that can go without anything else."""

    def __init__(
        self,
        classes: _Classes,
        places: Mapping[_Place, list[int]],
        modules: Mapping[str, nn.Module],
        order: Mapping[str, int],
        *,
        take_last: bool,
    ) -> None:
        self.modules = modules
        self.classes, self.places, self.order, self.take_last = classes, places, order, take_last
        self.where: dict[int, list[tuple[_Place, int]]] = defaultdict(list)
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

    def _starts(self) -> list[_Place]:
        """Where units are looked for, in execution order: first what layers write, then the axes of all tensors.

        A table that is added inside of every head (rotary frequencies) would find head dimensions before the heads.
        """
        places = [place for place in self.places if place[1] != "in" and is_stored(place[1])]
        writes = {place: place[1] == "out" and has_two_sides(self.modules[place[0]]) for place in places}
        return sorted(places, key=lambda p: (not writes[p], self.order.get(p[0], len(self.order)), p))

    def _closure(self, start: int) -> _Unit:
        """All that goes when one class does."""
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

    def _options(self, grid: _ClassGrid, cell: int) -> list[int]:
        index = np.unravel_index(cell, grid.cells.shape)
        return [factor[int(i)] for factor, i in zip(grid.factors, index, strict=True) if factor]

    def _choose(self, grid: _ClassGrid, cell: int, unit: _Unit) -> int | None:
        """A cell cannot go alone: the factor's index that goes with it, one that is gone already if there is one."""
        options = [c for c in self._options(grid, cell) if c not in self.classes.kept]
        gone = [c for c in options if c in unit.classes]
        options = gone or (options[::-1] if self.take_last else options)
        # A filter of every group rather than a whole group.
        return min(options, key=lambda c: c in self.classes.groups, default=None)

    def _why_neither(self, grid: _ClassGrid, cell: int) -> str:
        reasons = [self.classes.kept[c] for c in self._options(grid, cell) if c in self.classes.kept]
        return reasons[0] if reasons else "is a part of an axis that a view splits in fixed parts"

    def couplings(self) -> tuple[Coupling, ...]:
        """Units that touch the same places, together."""
        alike: dict[tuple[_Place, ...], list[dict[_Place, set[int]]]] = defaultdict(list)
        kinds: dict[tuple[_Place, ...], tuple[GroupKind, str]] = {}
        for unit in self.units:
            if unit.why_not:
                continue
            touched: dict[_Place, set[int]] = defaultdict(set)
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

    def _is_reader(self, place: _Place) -> bool:
        name, side = place
        tensor = getattr(self.modules[name], side.rpartition(".")[0], None)
        return side == "in" or is_statistic(side) or (side != "out" and isinstance(tensor, Tensor) and tensor.dim() > 1)

    def _kind(self, unit: _Unit) -> tuple[GroupKind, str]:
        if unit.classes & self.classes.heads:
            return "heads", self.classes.attention[min(unit.classes & self.classes.heads)]
        if unit.classes & self.classes.head_dims:
            return "head_dims", ""
        return "channels", ""

    def _coupling(self, units: Sequence[Mapping[_Place, set[int]]], kind: GroupKind, module: str) -> Coupling:
        places = sorted(
            {place for unit in units for place in unit}, key=lambda p: (self.order.get(p[0], len(self.order)), p)
        )
        members = tuple(
            Member(module=name, side=side, units=tuple(tuple(sorted(unit[name, side])) for unit in units))
            for name, side in places
        )
        stored = [m for m in members if is_stored(m.side)]
        writers = [m.module for m in stored if m.side == "out"]
        others = [m.module for m in stored if m.module]  # rather than the network itself, whose states these may be
        producer = [*writers, *others, stored[0].module][0]
        name = f"{module or producer}:{kind}" if kind != "channels" else producer
        return Coupling(name=name, kind=kind, num_units=len(units), members=members)

    def why_not(self, name: str) -> str:
        """Why a module with weights loses nothing."""
        module = self.modules[name]
        places = [place for place in self.places if place[0] == name and _is_written(module, place[1])]
        found = [c for place in places for c in self.places[place]]
        reasons = [self.unit_of[c].why_not for c in found if c in self.unit_of and self.unit_of[c].why_not]
        if reasons:
            return reasons[0]
        if has_two_sides(module) and "weight" not in module._parameters:
            return "its weight is computed by code of its own (a hook?); make the result an nn.Parameter named 'weight'"
        if not found:
            return "it has a single channel" if has_two_sides(module) else "its weights have a single element each"
        unit = self.unit_of.get(found[0])
        is_read = unit is not None and any(self._is_reader(place) for c in unit.classes for place, _ in self.where[c])
        return "all its channels are coupled with each other" if is_read else "nothing reads its channels"


def _disjoint(units: Sequence[dict[_Place, set[int]]]) -> list[dict[_Place, set[int]]]:
    """Units that share an index become one: through a chain of shuffles one can need a part of another."""
    found: list[dict[_Place, set[int]]] = []
    holder: dict[tuple[_Place, int], dict[_Place, set[int]]] = {}
    for unit in units:
        met = {id(holder[p, i]): holder[p, i] for p, ids in unit.items() for i in ids if (p, i) in holder}
        for other in met.values():
            unit = {place: unit[place] | other[place] for place in unit}
            found = [each for each in found if each is not other]
        found.append(unit)
        holder.update({(p, i): unit for p, ids in unit.items() for i in ids})
    return found
