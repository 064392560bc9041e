"""Which axes of the inputs may have any size in the exported file, and what they are called."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import Any, TypeAlias

from torch import Tensor, nn

from deploypipe.errors import ConfigError
from deploypipe.recipe import Export
from deploypipe.task import tensors

Axes: TypeAlias = dict[str, dict[int, str]]  # input -> axis from 1 -> name; axes of one name have one size

_IMAGE_AXES = {2: "height", 3: "width"}


def parameter_names(model: nn.Module, inputs: Any) -> list[str]:
    """The names that forward() has for one batch of inputs, in its order."""
    if isinstance(inputs, dict):
        return list(inputs)
    named = [p.name for p in signature(model.forward).parameters.values() if p.kind is not Parameter.VAR_POSITIONAL]
    return [named[i] if i < len(named) else f"input_{i}" for i in range(len(tensors(inputs)))]


def choose_axes(names: Sequence[str], batches: Sequence[Any], settings: Export) -> Axes:
    """The axes that the recipe names, and those in which `batches` (inputs of the network) differ.

    ConfigError where the recipe names an input or an axis that is not there.
    """
    sizes = {
        (name, axis): tuple(tensors(batch)[i].shape[axis] for batch in batches)
        for i, name in enumerate(names)
        for axis in range(1, min(tensors(batch)[i].dim() for batch in batches))
    }
    first = dict(zip(names, tensors(batches[0]), strict=True))
    axes: Axes = {}
    taken: dict[tuple[int, ...], str] = {}
    for (name, axis), seen in sizes.items():
        if len(set(seen)) > 1:
            given = taken.setdefault(seen, _axis_name(first[name], name, axis, set(taken.values())))
            axes.setdefault(name, {})[axis] = given
    for pattern, wanted in settings.dynamic_axes.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                "recipe", "export.dynamic_axes", f"no input is called {pattern!r}", f"the inputs are {', '.join(names)}"
            )
        for name in matched:
            if beyond := [axis for axis in wanted if axis >= first[name].dim()]:
                raise ConfigError(
                    "recipe",
                    "export.dynamic_axes",
                    f"input {name!r} has no axis {beyond[0]}",
                    f"its shape is {list(first[name].shape)}; axes count from 0",
                )
            axes[name] = axes.get(name, {}) | wanted
    return axes


def shortened(names: Sequence[str], inputs: Any, axes: Axes) -> Any:
    """The same inputs, cut to half of their size in each dynamic axis beside the batch."""
    if isinstance(inputs, dict):
        return {name: _cut(tensor, axes.get(name, {})) for name, tensor in inputs.items()}
    cut = tuple(_cut(tensor, axes.get(name, {})) for name, tensor in zip(names, tensors(inputs), strict=True))
    return cut if isinstance(inputs, (tuple, list)) else cut[0]


def _cut(tensor: Tensor, axes: dict[int, str]) -> Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, max(1, tensor.shape[axis] // 2))
    return tensor.contiguous()


def _axis_name(tensor: Tensor, name: str, axis: int, taken: set[str]) -> str:
    for candidate in _candidates(tensor, name, axis):
        if candidate not in taken:
            return candidate
    raise AssertionError("the last candidate is of this input and axis alone")


def _candidates(tensor: Tensor, name: str, axis: int) -> Iterator[str]:
    if tensor.dim() == 4 and axis in _IMAGE_AXES:
        yield _IMAGE_AXES[axis]
    elif axis == 1 and tensor.dim() in (2, 3):
        yield "sequence"
    yield f"{name}_{axis}"
