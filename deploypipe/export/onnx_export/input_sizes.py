"""Choose the input sizes to test: those of the user's batches, and other ones that the exported file must take."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import ConfigError
from deploypipe.export.onnx_export.dynamic_axes import Axes, choose_axes, in_order, input_names
from deploypipe.networks.batch_trees import map_tensors, tensors
from deploypipe.recipe import Export
from deploypipe.runtimes.named_arrays import name_outputs
from deploypipe.task import evaluating, forward, has_batch_axis, num_samples, take

Shape = tuple[int, ...]
Ranges = Mapping[
    str, tuple[int, int, int]
]  # dynamic axis -> smallest, usual and largest size, as a target declares them

_NUM_SAMPLES = 2
_GROWTH = 2  # inputs are tried at this multiple of the largest size, and at the smallest divided by it


@dataclass(slots=True)
class Extremes:
    """For each axis in which batches differ: samples of the batches with the smallest and the largest size."""

    least: dict[tuple[int, int], Any] = field(default_factory=dict)  # (tensor, axis) -> inputs
    largest: dict[tuple[int, int], Any] = field(default_factory=dict)

    def see(self, inputs: Any) -> None:
        """Record the sizes of one batch."""
        size = num_samples(inputs)
        if not size:
            return
        for number, tensor in enumerate(tensors(inputs)):
            for axis in range(int(has_batch_axis(tensor, size)), tensor.dim()):
                self._see(inputs, number, axis, tensor.shape[axis])

    def _see(self, inputs: Any, number: int, axis: int, seen: int) -> None:
        for kept, is_beyond in ((self.least, int.__lt__), (self.largest, int.__gt__)):
            before = kept.get((number, axis))
            if before is None or is_beyond(seen, _size(before, number, axis)):
                kept[number, axis] = map_tensors(Tensor.clone, take(inputs, _NUM_SAMPLES))

    def inputs(self) -> tuple[Any, ...]:
        """One batch for each extreme, the largest first; () if all batches have one size."""
        varying = [key for key in self.largest if _size(self.least[key], *key) < _size(self.largest[key], *key)]
        return _distinct([*(self.largest[key] for key in varying), *(self.least[key] for key in varying)])


def extremes_of(batches: Iterable[Any]) -> tuple[Any, ...]:
    """`Extremes.inputs` of batches of inputs."""
    extremes = Extremes()
    for inputs in batches:
        extremes.see(inputs)
    return extremes.inputs()


def other_sizes(
    network: nn.Module, inputs: Any, extremes: Sequence[Any], settings: Export, ranges: Ranges | None = None
) -> tuple[Any, ...]:
    """Inputs of other sizes than `inputs`, at which the network, the pruned network and the file must work.

    These are the `extremes` of the user's batches, and for dynamic axes the ends of the ranges that the target
    declares. Without a range it is half and twice the sizes seen, if the network accepts them. ConfigError if the
    network does not accept a declared size.
    """
    names = input_names(network, inputs)
    seen = [in_order(network, each) for each in (inputs, *extremes)]
    axes = choose_axes(names, seen, settings)
    found = [*extremes]
    if axes:
        used = {name for own in axes.values() for name in own.values()}
        least, _, most = ({name: ends[i] for name, ends in (ranges or {}).items() if name in used} for i in range(3))
        found += _stretched(network, names, max(seen, key=_volume), axes, most, lambda size: size * _GROWTH)
        found += _stretched(network, names, min(seen, key=_volume), axes, least, lambda size: max(1, size // _GROWTH))
    return _distinct(found, but=inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class UsualInputs:
    """Inputs for timing files with dynamic axes. sizes: of each such axis, by name."""

    inputs: Any
    sizes: dict[str, int]
    is_declared: bool  # by the target; else they are those of the batch

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        if self.is_declared:
            return f"latency and memory are measured at {sizes}, the usual size in the target's [dynamic_dims]"
        return (
            f"latency and memory are measured at {sizes}, the size of the first calibration batch; the target can "
            f"choose another: [dynamic_dims] {next(iter(self.sizes))} = [smallest, usual, largest]"
        )


def usual_inputs(
    network: nn.Module, inputs: Any, extremes: Sequence[Any], settings: Export, ranges: Ranges
) -> UsualInputs | None:
    """`inputs` at the usual sizes that the target declares; None if no axis but the batch is dynamic.

    extremes: inputs of the smallest and largest sizes, which say what axes are dynamic.
    """
    names = input_names(network, inputs)
    seen = [in_order(network, each) for each in (inputs, *extremes)]
    axes = choose_axes(names, seen, settings)
    used = {name for own in axes.values() for name in own.values()}
    if not used:
        return None
    declared = {name: ranges[name][1] for name in ranges if name in used}
    found = resized(names, seen[0], axes, declared)
    sizes = {
        name: int(tensor.shape[axis])
        for key, tensor in zip(names, tensors(found), strict=True)
        for axis, name in axes.get(key, {}).items()
    }
    return UsualInputs(inputs=found, sizes=sizes, is_declared=bool(declared))


def ends_of(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The largest and the smallest of the inputs; fewer if there are fewer."""
    return _distinct([max(inputs, key=_volume), min(inputs, key=_volume)]) if inputs else ()


def _volume(inputs: Any) -> int:
    return sum(math.prod(shape) for shape in shapes_of(inputs))


def _stretched(
    network: nn.Module,
    names: Sequence[str],
    inputs: Any,
    axes: Axes,
    declared: Mapping[str, int],
    otherwise: Callable[[int], int],
) -> list[Any]:
    wanted = {
        name: declared.get(name, otherwise(tensor.shape[axis]))
        for key, tensor in zip(names, tensors(inputs), strict=True)
        for axis, name in axes.get(key, {}).items()
    }
    tried = resized(names, inputs, axes, wanted)
    error = failure(network, tried)
    if error and declared:
        shown = ", ".join(f"{name} = {size}" for name, size in sorted(declared.items()))
        raise ConfigError(
            "target", "dynamic_dims", f"{type(network).__name__} fails at {shown}: {error}", "narrow the range"
        )
    return [] if error else [tried]


def failure(network: nn.Module, inputs: Any) -> str:
    """Why the network does not compute finite numbers from these inputs; "" if it does."""
    try:
        with evaluating(network), torch.no_grad():
            outputs = name_outputs(forward(network, inputs))
    except Exception as error:  # forward() may raise anything on sizes it was not written for
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    odd = [name for name, tensor in outputs.items() if not torch.isfinite(tensor).all()]
    return f"output {odd[0]!r} holds NaN or infinity" if odd else ""


def resized(names: Sequence[str], inputs: Any, axes: Axes, sizes: Mapping[str, int]) -> Any:
    """Change the sizes of dynamic axes, by name: cut the inputs, or repeat them from the beginning."""
    own = iter(names)

    def of(tensor: Tensor) -> Tensor:
        for axis, name in axes.get(next(own), {}).items():
            if name in sizes:
                places = torch.arange(sizes[name], device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, places)
        return tensor

    return map_tensors(of, inputs)


def shapes_of(inputs: Any) -> tuple[Shape, ...]:
    """The shapes of all tensors, without the number of samples."""
    size = num_samples(inputs)
    return tuple(tuple(t.shape[int(has_batch_axis(t, size)) :]) for t in tensors(inputs))


def _distinct(found: Sequence[Any], but: Any = None) -> tuple[Any, ...]:
    known = {shapes_of(but)} if but is not None else set()
    kept = []
    for inputs in found:
        if shapes_of(inputs) not in known:
            known.add(shapes_of(inputs))
            kept.append(inputs)
    return tuple(kept)


def _size(inputs: Any, number: int, axis: int) -> int:
    return int(tensors(inputs)[number].shape[axis])


def tested_sizes(names: Sequence[str], batches: Sequence[Any], axes: Axes) -> dict[str, tuple[int, int]]:
    """By name: the smallest and the largest size of the batch axis and of each dynamic axis among the batches."""
    seen: dict[str, list[int]] = {"batch": [num_samples(inputs) for inputs in batches]}
    for inputs in batches:
        for name, tensor in zip(names, tensors(inputs), strict=True):
            for axis, given in axes.get(name, {}).items():
                seen.setdefault(given, []).append(tensor.shape[axis])
    return {name: (min(sizes), max(sizes)) for name, sizes in seen.items()}
