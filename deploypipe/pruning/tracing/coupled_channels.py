"""Find channels, heads and features that can only be removed together."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.modules.hook_computed_weights import make_plain_
from deploypipe.pruning.modules.module_attributes import mark_sizes_
from deploypipe.pruning.modules.module_calls import evaluating, output_tensors
from deploypipe.pruning.modules.module_kinds import has_two_sides, is_depthwise, out_tensor
from deploypipe.pruning.surgery.module_slicing import forget_caches_
from deploypipe.pruning.tracing.atom_classes import AtomClasses, components
from deploypipe.pruning.tracing.index_algebra import Atoms
from deploypipe.pruning.tracing.index_propagation import Propagation
from deploypipe.pruning.tracing.removable_units import Coupling, Place, UnitFinder, is_written
from deploypipe.pruning.tracing.trace_record import AxisTrace
from deploypipe.records import Frozen, Side
from deploypipe.task import forward

_KNOWN = {"weight", "bias", "running_mean", "running_var"}  # a known layer's sides stand for these


def trace_groups(
    model: nn.Module, batches: Sequence[Any], order: Mapping[str, int], as_wide: Collection[str] = ()
) -> tuple[tuple[Coupling, ...], tuple[Coupling, ...], tuple[Frozen, ...]]:
    """Couplings in execution order, alternatives to try if one fails, and layers that cannot shrink with the reason.

    batches: inputs of several sizes; whatever any of them couples or reads counts. order: module name -> place in the
    execution order; absent modules are never called. Works on a copy of `model`. Alternatives exist if a view splits an
    axis into two that can both shrink: couplings take the first of them (whole heads), alternatives the last
    (dimensions of every head). as_wide: see `AxisTrace`.
    """
    try:
        trace = _propagate(model, batches, as_wide)
    except Exception as error:  # a forward() that cannot run in inference mode may raise anything
        raise_if_exhausted(error)
        reason = f"could not be traced: {type(error).__name__}: {error}"
        modules = with_weights(dict(model.named_modules()))
        return (), (), tuple(_row(name, module, reason) for name, module in modules.items())
    classes = AtomClasses(trace)
    places = _places(trace, classes)
    first = UnitFinder(classes, places, trace.modules, order, take_last=False)
    last = UnitFinder(classes, places, trace.modules, order, take_last=True)
    couplings, others = first.couplings(), last.couplings()
    known = {c.members for c in couplings}
    losing = {name for c in couplings for name in shrinking_modules(c, trace.modules)}
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


def shrinking_modules(coupling: Coupling, modules: Mapping[str, nn.Module]) -> list[str]:
    """Modules whose own channels get fewer. Layers with two sides count only if they write the channels."""
    return list(dict.fromkeys(m.module for m in coupling.members if is_written(modules[m.module], m.side)))


def freeze(coupling: Coupling, reason: str, modules: Mapping[str, nn.Module]) -> list[Frozen]:
    """A row for every module that would lose weights by a coupling that must stay."""
    because = f"shares its channels with {coupling.name!r}, which cannot be removed"
    names = [name for name in shrinking_modules(coupling, modules) if name != coupling.name]
    rows = [_row(name, modules[name], because) for name in names]
    return [Frozen(name=coupling.name, kind=coupling.kind, reason=reason), *rows]


def _row(name: str, module: nn.Module, reason: str) -> Frozen:
    """A row for one module. The network itself is named by its class."""
    if has_two_sides(module):
        return Frozen(name=name, kind="channels", reason=reason)
    return Frozen(name=name or type(module).__name__, kind="weights", reason=reason)


def _propagate(model: nn.Module, batches: Sequence[Any], as_wide: Collection[str]) -> AxisTrace:
    copy = copied(model)
    forget_caches_(copy)
    make_plain_(copy.modules())
    mark_sizes_(copy)
    with torch.inference_mode():
        trace = AxisTrace(copy, batches, as_wide)
        for name, module in copy.named_modules():
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, name=name: trace.enter(name, [*args, *kwargs.values()]), with_kwargs=True
            )
            module.register_forward_hook(lambda *_: trace.leave())
        with evaluating(copy), trace.calls, Propagation(trace):
            outputs = [forward(copy, inputs) for inputs in batches]
    for place, atoms in trace.indices.counted:
        trace.sized.setdefault(place, []).append(atoms)
    written = [axis for tensor in output_tensors(outputs) for axis in trace.of(tensor)]
    trace.indices.kept[:0] = [
        (f.atoms, "its channels are the network's output") for axis in written for f in axis if f.atoms is not None
    ]
    _keep_unread(trace)
    return trace


def _keep_unread(trace: AxisTrace) -> None:
    """Keep what these inputs do not read, because an input of another size or kind may read it."""
    for tensor in {id(t): t for own in trace.stored.values() for t in own.values()}.values():
        if id(tensor) not in trace.used:
            for axis in trace.of(tensor):
                trace.indices.keep(axis, "is not read with these inputs, but may be with others")
    partial = trace.partial.left_out()
    if not partial:
        return
    classes, _ = components(trace.indices, trace.indices.equal)
    written: set[int] = set()
    for name in trace.called & {name for name, module in trace.modules.items() if out_tensor(module)}:
        local, number = out_tensor(trace.modules[name]) or ("", 0)
        for factor in trace.of(getattr(trace.modules[name], local))[number]:
            written.update(classes[factor.atoms].tolist() if factor.atoms is not None else ())
    for whole, unread in partial:
        # Of a layer's channels only the unread rest is kept. A table is kept whole: its length may be the input's.
        is_written = not written.isdisjoint(classes[whole].tolist())
        if is_written and trace.partial.is_consumed(whole):
            continue
        why = "is read only in part with these inputs, and others may read more of it"
        trace.indices.kept.append((unread if is_written else whole, why))


def _places(trace: AxisTrace, classes: AtomClasses) -> dict[Place, list[int]]:
    """Place -> the class of each of its indices, for sides of layers, axes of tensors and sizes in attributes."""
    places: dict[Place, list[int]] = {}

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
        if axes and out_tensor(trace.modules[name]) is None:  # known layers update their own sizes
            add(name, f"@{attribute}", axes[0])
    for (name, side), atoms in trace.statistics.items():
        add(name, side, atoms)
    return places


def _tensor_sides(trace: AxisTrace, name: str, covered: tuple[str, int] | None) -> Iterator[tuple[Side, Atoms | None]]:
    """The axes of a module's own tensors. The outputs of a known layer stand for all its tensors."""
    for local, tensor in trace.stored[name].items():
        for number, axis in enumerate(trace.of(tensor)):
            atoms = axis[0].atoms if axis else None
            if covered == (local, number):
                yield "out", atoms
            elif not covered or local not in _KNOWN or (isinstance(trace.modules[name], nn.Embedding) and number == 0):
                yield f"{local}.{number}", atoms
