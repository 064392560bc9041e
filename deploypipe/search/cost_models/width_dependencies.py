"""List a network's layers with weights, and which groups and blocks change the widths of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.observe.calibration_pass import hooked
from deploypipe.pruning.modules.module_calls import output_tensors
from deploypipe.records import ChannelGroup, Structures
from deploypipe.task import evaluating, forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The inputs or the outputs of a layer."""

    dense: int  # channels
    per_unit: dict[str, int]  # by group: channels that one of its units has here

    def width(self, removed: Mapping[str, int]) -> int:
        """Channels left. removed: units by group; groups that are not named keep all."""
        return self.dense - sum(count * removed.get(group, 0) for group, count in self.per_unit.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWidths:
    """One layer, and what decides its two widths."""

    module: str
    kind: str  # layers of one kind take the same time at the same widths
    macs: float  # of one sample, dense
    blocks: tuple[str, ...]  # droppable blocks that it lies in
    inputs: Side
    outputs: Side

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.inputs.per_unit, *self.outputs.per_unit)))


def find_layer_widths(dense: nn.Module, structures: Structures, inputs: Any) -> tuple[LayerWidths, ...]:
    """List the layers that any group or block changes, in the network's order. inputs: a batch, for one forward pass.

    A layer is a module with a parameter of at least two axes of its own. Axis 0 counts outputs and axis 1 inputs; in
    transposed convolutions and embeddings it is the other way round.
    """
    shapes = _output_shapes(dense, inputs)
    sides = _sides(structures)
    layers = []
    for name, module in dense.named_modules():
        weight = _weight(module)
        blocks = tuple(b.name for b in structures.blocks if name == b.name or name.startswith(f"{b.name}."))
        per_unit = sides.get(name, ({}, {}))
        if weight is None or not (blocks or any(per_unit)):
            continue
        num_inputs, num_outputs = _dense_widths(module, weight)
        if int(getattr(module, "groups", 1)) == num_inputs == num_outputs:  # depthwise: one set of channels
            per_unit = (per_unit[1], per_unit[1])
        shape = shapes.get(name, ())
        layers.append(
            LayerWidths(
                module=name,
                kind=f"{type(module).__name__} {[*weight.shape]} to {[*shape]}",
                macs=weight.numel() * max(1.0, prod(shape) / num_outputs),
                blocks=blocks,
                inputs=Side(dense=num_inputs, per_unit=per_unit[0]),
                outputs=Side(dense=num_outputs, per_unit=per_unit[1]),
            )
        )
    return tuple(layers)


def _sides(structures: Structures) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """By module: (channels of its inputs, of its outputs) by group and unit."""
    found: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for group in structures.groups:
        for member in group.members:
            axis = 0 if member.side == "in" or member.side.endswith(".1") else 1
            if member.side in ("in", "out") or member.side.endswith((".0", ".1")):
                found.setdefault(member.module, ({}, {}))[axis][group.name] = _per_unit(group, member.units)
    return found


def _per_unit(group: ChannelGroup, units: Iterable[tuple[int, ...]]) -> int:
    return round(sum(len(unit) for unit in units) / group.num_units)


def _weight(module: nn.Module) -> Tensor | None:
    own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    return max(own, key=Tensor.numel) if own else None


def _dense_widths(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False) or isinstance(module, nn.Embedding):
        return weight.shape[0], weight.shape[1] * groups
    return weight.shape[1] * groups, weight.shape[0]


def _output_shapes(dense: nn.Module, inputs: Any) -> dict[str, tuple[int, ...]]:
    """By module that is called: the shape of its first output, for one sample."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        def hook(_m: nn.Module, _a: tuple[Any, ...], output: Any) -> None:
            first = next(iter(output_tensors(output)), None)
            shapes.setdefault(name, () if first is None else tuple(first.shape[1:]))

        return hook

    hooks = [(name, keep(name)) for name, _ in dense.named_modules() if name]
    with evaluating(dense), torch.no_grad(), hooked(dense, hooks):
        forward(dense, inputs)
    return shapes
