"""Cut one group or one block of a network for a moment, with the readers repaired in closed form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploypipe.networks.model_copies import copied
from deploypipe.numerics.least_squares import solve_towards
from deploypipe.observe.layer_regressions import (
    blocks_of_matrix,
    columns,
    from_blocks,
    has_channels_last,
    num_inputs,
    num_taps,
    reads,
    weight_matrix,
)
from deploypipe.observe.pass_statistics import InputMoments, Moments
from deploypipe.pruning.modules.bypass import Bypass
from deploypipe.pruning.modules.module_kinds import normalizes_over_channels
from deploypipe.pruning.surgery.module_slicing import cut_
from deploypipe.records import Block, ChannelGroup, Edit, Names
from deploypipe.search.allocation.dense_prefix import forward_as

RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPoint:
    """A block to remove."""

    block: Block


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPoint:
    """A group to cut, and the units that stay."""

    group: ChannelGroup
    kept: tuple[int, ...]


Point: TypeAlias = BlockPoint | GroupPoint


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleCut:
    """What a cut changes in a network. One of `weights`, `block` and `networks` is given."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # by reader; removed inputs are zero
    shifts: dict[str, Tensor] = field(default_factory=dict)  # by reader: added to its outputs
    block: Block | None = None  # replaced by the identity
    networks: tuple[nn.Module, ...] = ()  # without the units, one for each worker


def replica(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with parameters of its own that share the memory of the model's.

    A parameter of the copy can be pointed at other values, and each thread can run its own copy.
    """
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copied(model, {**shared}).eval()


def readers_of(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By layer that reads the group: the inputs of each unit.

    Empty where zeros do not stand for removed inputs, as before norms over channels.
    """
    if any(normalizes_over_channels(modules[member.module]) for member in group.members):
        return {}
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for member in group.members:
        if reads(modules[member.module], member.side):
            before = found.get(member.module, ((),) * group.num_units)
            found[member.module] = tuple(old + new for old, new in zip(before, member.units, strict=True))
    return found


def changed_modules(point: Point, modules: Mapping[str, nn.Module]) -> Names:
    """The modules that compute something else than in the dense network."""
    if isinstance(point, BlockPoint):
        return (point.block.name,)
    return tuple(readers_of(point.group, modules)) or tuple(member.module for member in point.group.members)


def make_cut(model: nn.Module, point: Point, moments: Moments, copies: int) -> SingleCut:
    """Prepare a cut of one group or block, and repair the layers that read the group.

    The removed inputs of the readers are set to zero, which is what surgery does. If `moments` has the layer, its other
    inputs are solved to predict the dense outputs. copies: how many networks are made where nothing but surgery gives
    the outputs; those are not repaired.
    """
    if isinstance(point, BlockPoint):
        return SingleCut(block=point.block)
    modules = dict(model.named_modules())
    gone = sorted(set(range(point.group.num_units)) - set(point.kept))
    readers = readers_of(point.group, modules)
    if not readers:
        return SingleCut(networks=tuple(_smaller(model, point.group, gone) for _ in range(copies)))
    weights, shifts = {}, {}
    for name, units in readers.items():
        layer: Any = modules[name]
        removed = {i for unit in gone for i in units[unit]}
        # It may read other groups' channels too (concatenation): they all stay.
        stays = columns([i for i in range(num_inputs(layer)) if i not in removed], num_taps(layer))
        seen = moments.inputs.get(name)
        if seen is None:
            weights[name] = _as_stored(layer, _masked(layer, stays))
            continue
        weight, shift = _repaired(layer, stays, seen)
        weights[name], shifts[name] = _as_stored(layer, weight), _as_outputs(layer, shift)
    return SingleCut(weights=weights, shifts=shifts)


def _smaller(model: nn.Module, group: ChannelGroup, gone: Sequence[int]) -> nn.Module:
    network = replica(model)
    removed = [(m, tuple(sorted({i for unit in gone for i in m.units[unit]}))) for m in group.members]
    cut_(network, [Edit(module=m.module, side=m.side, removed=indices) for m, indices in removed])
    return network.eval()


@contextmanager
def applied(modules: Mapping[str, nn.Module], cut: SingleCut) -> Iterator[None]:
    """Change a copy of the dense network. A network of the cut itself is left as it is."""
    with ExitStack() as stack:
        if cut.block is not None:
            block = modules[cut.block.name]
            stack.enter_context(forward_as(block, Bypass(block, cut.block.returns).forward))
        for name, weight in cut.weights.items():
            stack.enter_context(_weight(modules[name], weight))
        for name, shift in cut.shifts.items():
            stack.callback(modules[name].register_forward_hook(_adding(shift)).remove)
        yield


def _adding(shift: Tensor) -> Callable[..., Tensor]:
    return lambda _m, _i, output: output + shift


@contextmanager
def _weight(layer: Any, weight: Tensor) -> Iterator[None]:
    dense = layer.weight.data
    layer.weight.data = weight
    try:
        yield
    finally:
        layer.weight.data = dense


def _masked(layer: Any, stays: Sequence[int]) -> Tensor:
    """Set all input columns but these to zero."""
    dense = weight_matrix(layer).detach()
    weight = torch.zeros_like(dense)
    weight[:, list(stays)] = dense[:, list(stays)]
    return weight


def _repaired(layer: Any, stays: Sequence[int], moments: InputMoments) -> tuple[Tensor, Tensor]:
    """Set all input columns but these to zero, and solve those to predict the dense output."""
    dense = weight_matrix(layer).detach().cpu().double()
    index = torch.tensor(list(stays))
    rows = moments.covariance[index]
    weight = torch.zeros_like(dense)
    weight[:, index] = solve_towards(rows[:, index], rows @ dense.T, dense[:, index].T, RIDGE).T
    return weight, (dense - weight) @ moments.mean


def _as_stored(layer: Any, weight: Tensor) -> Tensor:
    """A matrix of weights in the layer's shape, type and memory order."""
    stored: Tensor = layer.weight
    return torch.empty_like(stored.detach()).copy_(from_blocks(layer, blocks_of_matrix(layer, weight)))


def _as_outputs(layer: Any, shift: Tensor) -> Tensor:
    """One number for each output, shaped to be added to the layer's outputs."""
    shaped = shift.to(layer.weight)
    return shaped if has_channels_last(layer) else shaped.reshape(-1, *[1] * (layer.weight.dim() - 2))
