"""Which channels can only be removed together, traced once. The only importer of torch_pruning.

torch-pruning's graph says which layers touch, and its index mappings say how indices travel through concatenations,
splits and flattens. The walk over that graph is our own: it keeps every (index, root index) pair apart, so that
channels a gate or a split ties together become one unit, and it ends, because each pair is visited once.
"""

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex

from deploypipe.pruning.slicing import filters_per_group, has_two_sides, width
from deploypipe.records import Frozen, Member, Side
from deploypipe.task import forward

_Pair = tuple[int, int]  # (index of the module, index of the root)
_Touched = dict[tuple[str, Side], set[_Pair]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """The channels of one producer and everything that must shrink with them."""

    name: str
    num_units: int
    members: tuple[Member, ...]


@dataclass(slots=True)
class _Trace:
    couplings: list[Coupling] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)


class _TimeUpError(BaseException):
    """Thrown into the tracing thread; not an Exception, so that no `except Exception` on its way can hold it up."""


def trace_groups(
    model: nn.Module, inputs: Any, order: Mapping[str, int], time_limit_s: float = 120.0
) -> tuple[tuple[Coupling, ...], tuple[Frozen, ...]]:
    """Couplings of all producers in execution order, and the producers that cannot shrink, with the reason.

    order: module name -> place in the execution order; modules absent from it are never called. Works on a copy of
    `model`. Whatever torch-pruning fails on, or does not finish within the limit, is a Frozen row, never an exception.
    """
    copy = deepcopy(model).requires_grad_(True)
    producers = {
        name: module
        for name, module in sorted(copy.named_modules(), key=lambda item: order.get(item[0], -1))
        if name in order and has_two_sides(module)
    }
    trace = _Trace()

    def work() -> None:
        graph = torch_pruning.DependencyGraph().build_dependency(
            copy, inputs, forward_fn=forward, output_transform=_floating, verbose=False
        )
        _collect(graph, copy, producers, order, trace)

    failure = _within(time_limit_s, work)
    if failure:
        settled = {c.name for c in trace.couplings} | {f.name for f in trace.frozen}
        settled |= {m.module for c in trace.couplings for m in c.members if m.side == "out"}
        trace.frozen += [Frozen(name=n, kind="channels", reason=failure) for n in producers if n not in settled]
    return tuple(trace.couplings), tuple(trace.frozen)


def freeze(coupling: Coupling, reason: str, producers: Collection[str]) -> list[Frozen]:
    """A row for every producer of a coupling that must stay."""
    names = dict.fromkeys([coupling.name, *(m.module for m in coupling.members if m.side == "out")])
    because = f"shares its channels with {coupling.name!r}, which stays"
    return [
        Frozen(name=name, kind="channels", reason=reason if name == coupling.name else because)
        for name in names
        if name in producers
    ]


def _floating(outputs: Any) -> list[Tensor]:
    """The output tensors that autograd can follow back, however they are nested."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.grad_fn is not None else []
    if isinstance(outputs, Mapping):
        return [t for value in outputs.values() for t in _floating(value)]
    if isinstance(outputs, Iterable) and not isinstance(outputs, str):
        return [t for value in outputs for t in _floating(value)]
    return []


def _within(limit_s: float, work: Callable[[], None]) -> str:
    """Run `work` in a thread that is interrupted at the limit. Returns why it failed, or "".

    An exception set on the thread stops loops in Python code, which is where torch-pruning hangs (swin_t, maxvit_t); it
    needs neither the main thread, as signals do, nor a model that can be pickled, as a child process does.
    """
    failures: list[str] = []

    def guarded() -> None:
        try:
            work()
        except _TimeUpError:
            failures.append(f"tracing did not finish within {limit_s:g} s")
        except (
            Exception
        ) as error:  # torch-pruning raises anything (ZeroDivisionError, TypeError, ...) on what it cannot trace
            failures.append(f"could not be traced: {type(error).__name__}: {error}")

    thread = threading.Thread(target=guarded, name="trace-couplings", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeUpError))
        thread.join(limit_s)
        if not failures:
            failures.append(f"tracing did not finish within {limit_s:g} s")
    return failures[0] if failures else ""


def _collect(
    graph: Any, model: nn.Module, producers: Mapping[str, nn.Module], order: Mapping[str, int], trace: _Trace
) -> None:
    names = {module: name for name, module in model.named_modules()}
    owners: dict[tuple[str, Side, int], str] = {}  # which coupling an index of a module belongs to
    for name, module in producers.items():
        total = width(module, "out") or 0
        claimed = {owners[name, "out", i] for i in range(total) if (name, "out", i) in owners}
        if claimed:
            if any((name, "out", i) not in owners for i in range(total)):
                reason = f"only some of its channels are coupled with {', '.join(sorted(claimed))}"
                trace.frozen.append(Frozen(name=name, kind="channels", reason=reason))
            continue
        if module not in graph.module2node:
            reason = "its output does not reach the network's output in a way that can be traced"
            trace.frozen.append(Frozen(name=name, kind="channels", reason=reason))
            continue
        touched, blocker = _walk(graph, names, module)
        units = _units(total, touched, model)
        members = _members(units, touched, order)
        blocker = blocker or _unfit(model, members, len(units))
        indices = {(m.module, m.side, i) for m in members for unit in m.units for i in unit}
        others = sorted({owners[index] for index in indices if index in owners})
        blocker = blocker or (f"shares channels with {', '.join(others)}" if others else "")
        for index in indices:
            owners.setdefault(index, name)
        coupling = Coupling(name=name, num_units=len(units), members=members)
        if blocker:
            trace.frozen += freeze(coupling, blocker, producers)
        else:
            trace.couplings.append(coupling)


def _walk(graph: Any, names: Mapping[nn.Module, str], root: nn.Module) -> tuple[_Touched, str]:
    """All (module, side) reached from the root's output channels, with index pairs; and what forbids the removal."""
    start = graph.get_pruner_of_module(root).prune_out_channels
    node = graph.module2node[root]
    pairs = [_HybridIndex(idx=i, root_idx=i) for i in range(width(root, "out") or 0)]
    seen: dict[tuple[int, Any], set[Any]] = defaultdict(set)
    seen[id(node), start] = set(pairs)
    touched: _Touched = defaultdict(set)
    touched[names[root], "out"].update(pairs)
    blocker = ""
    todo = [(node, start, pairs)]
    while todo:
        node, handler, pairs = todo.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(handler):
                continue
            indices = pairs
            for mapping in dep.index_mapping:
                indices = mapping(indices) if mapping is not None else indices
            known = seen[id(dep.target), dep.handler]
            fresh = [pair for pair in indices if pair not in known]
            if not fresh:
                continue
            known.update(fresh)
            todo.append((dep.target, dep.handler, fresh))
            target = dep.target.module
            blocker = blocker or _forbidden(graph, target, names)
            if target in names and width(target, "out") is not None:
                reads = has_two_sides(target) and graph.is_in_channel_pruning_fn(dep.handler)
                side: Side = "in" if reads else "out"
                touched[names[target], side].update((pair.idx, pair.root_idx) for pair in fresh)
    return touched, blocker


def _forbidden(graph: Any, target: Any, names: Mapping[nn.Module, str]) -> str:
    if isinstance(target, nn.Parameter):
        return f"reaches the parameter {graph._param_to_name.get(target, '?')!r}, whose channels are not a layer's"
    if target in names and width(target, "out") is None and next(target.parameters(), None) is not None:
        return f"reaches {names[target]!r}, a {type(target).__name__}, which cannot be cut"
    return ""


def _units(total: int, touched: _Touched, model: nn.Module) -> list[tuple[int, ...]]:
    """Root indices that must go together: those that meet in one index of a module, or in one place of its groups."""
    parent = list(range(total))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for (name, side), pairs in touched.items():
        per_group = filters_per_group(model.get_submodule(name), side)
        first: dict[int, int] = {}
        for index, root in pairs:
            place = index if per_group is None else index % per_group
            a, b = find(root), find(first.setdefault(place, root))
            parent[max(a, b)] = min(a, b)
    units: dict[int, list[int]] = defaultdict(list)
    for i in range(total):
        units[find(i)].append(i)
    return [tuple(unit) for _, unit in sorted(units.items())]


def _members(units: list[tuple[int, ...]], touched: _Touched, order: Mapping[str, int]) -> tuple[Member, ...]:
    unit_of = {root: number for number, unit in enumerate(units) for root in unit}
    members = []
    for (name, side), pairs in sorted(touched.items(), key=lambda item: (order.get(item[0][0], -1), item[0])):
        indices: list[set[int]] = [set() for _ in units]
        for index, root in pairs:
            indices[unit_of[root]].add(index)
        members.append(Member(module=name, side=side, units=tuple(tuple(sorted(i)) for i in indices)))
    return tuple(members)


def _unfit(model: nn.Module, members: tuple[Member, ...], num_units: int) -> str:
    """Why the members' own layers forbid the removal, or ""."""
    if num_units < 2:
        return "all its channels are coupled with each other"
    uses: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)].append(name)
    for member in members:
        module = model.get_submodule(member.module)
        if isinstance(module, nn.GroupNorm) and module.num_groups != module.num_channels:
            return f"{member.module!r} normalises over groups of channels, whose statistics would change"
        if isinstance(module, nn.LayerNorm):
            return f"{member.module!r} normalises over the channels, whose statistics would change"
        if isinstance(module, nn.Linear | _ConvNd | nn.Embedding) and "weight" not in module._parameters:
            return f"the weight of {member.module!r} is computed (a parametrization); remove it first"
        for parameter in module.parameters(recurse=False):
            shared = [n for n in uses[id(parameter)] if n.rpartition(".")[0] != member.module]
            if shared:
                return f"{member.module!r} shares a parameter with {shared[0]!r}"
        total = width(module, member.side) or 0
        if any(index >= total for unit in member.units for index in unit):
            return f"{member.module!r} has {total} channels, fewer than it is coupled with (padding or slicing between)"
    return ""
