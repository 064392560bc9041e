"""Choose which axes of the inputs may have any size in the exported file, and name them."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import Any, TypeAlias

from torch import Tensor, nn

from deploypipe.errors import ConfigError, DataError
from deploypipe.networks.batch_trees import leaves, map_leaves, same_value, structure, tensors
from deploypipe.recipe import Export
from deploypipe.runtimes.named_arrays import input_paths
from deploypipe.task import has_batch_axis, num_samples

Axes: TypeAlias = dict[str, dict[int, str]]  # input -> axis from 1 -> name; axes of one name have one size

_IMAGE_AXES = {2: "height", 3: "width"}


def input_names(model: nn.Module, inputs: Any) -> list[str]:
    """The file's names for the tensors of one batch of inputs, in its order: see `runtimes.named_arrays`."""
    return [path for path, _ in input_paths(inputs, _member_names(model, inputs))]


def _member_names(model: nn.Module, inputs: Any) -> list[str]:
    """The names that forward() gives to the members of a tuple or list."""
    count = len(inputs) if isinstance(inputs, (tuple, list)) else 1
    named = [p.name for p in signature(model.forward).parameters.values() if p.kind is not Parameter.VAR_POSITIONAL]
    return [named[i] if i < len(named) else f"input_{i}" for i in range(count)]


def in_order(model: nn.Module, inputs: Any) -> Any:
    """Sort a mapping's members as forward() orders its parameters, as an exporter does; unknown members come last."""
    if not isinstance(inputs, Mapping):
        return inputs
    order = [name for name in signature(model.forward).parameters if name in inputs]
    return {name: inputs[name] for name in [*order, *(name for name in inputs if name not in order)]}


def require_constants(batches: Sequence[Any]) -> None:
    """DataError if anything but the tensors differs between batches: the rest becomes constants of the file."""
    first = list(leaves(batches[0]))
    for number, batch in enumerate(batches[1:], start=1):
        if structure(batch) != structure(batches[0]):
            odd = sorted(set(structure(batch)) ^ set(structure(batches[0])))
            raise DataError(f"batches differ in what they hold ({', '.join(odd[:3])}); give the same members in each")
        for one, other in zip(first, leaves(batch), strict=True):
            are_tensors = isinstance(one.value, Tensor) and isinstance(other.value, Tensor)
            if not are_tensors and not same_value(one.value, other.value):
                raise DataError(
                    f"{one.place} is {_shown(one.value)} in the first batch and {_shown(other.value)} in batch "
                    f"{number}; values other than tensors become constants of the file: give torch.tensor(...), or the "
                    "same value in every batch"
                )


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def free_axes(names: Sequence[str], inputs: Any, batch: object, axes: Axes) -> Any:
    """The tree of `inputs` with each tensor replaced by its axes of any size, as torch's exporters want it.

    names: of the tensors, in order. batch: stands for the batch axis, in tensors that have one.
    """
    own_names, size = iter(names), num_samples(inputs)

    def of(leaf: Any) -> dict[int, object] | None:
        if not isinstance(leaf, Tensor):
            return None
        own: dict[int, object] = dict(axes.get(next(own_names), {}))
        return {0: batch, **own} if has_batch_axis(leaf, size) else own

    return map_leaves(of, inputs)


def choose_axes(names: Sequence[str], batches: Sequence[Any], settings: Export) -> Axes:
    """Return the axes that the recipe names, and those in which `batches` (inputs of the network) differ.

    Axis 0 is included for a tensor without a batch axis (see `task.num_samples`). ConfigError if the recipe names an
    input or an axis that does not exist.
    """
    sizes = [num_samples(batch) for batch in batches]
    columns = dict(zip(names, zip(*map(tensors, batches), strict=True), strict=True))
    first = {name: column[0] for name, column in columns.items()}
    axes: Axes = {}
    taken: dict[tuple[int, ...], str] = {}
    for name, column in columns.items():
        is_batched = all(has_batch_axis(tensor, size) for tensor, size in zip(column, sizes, strict=True))
        for axis in range(int(is_batched), min(tensor.dim() for tensor in column)):
            seen = tuple(tensor.shape[axis] for tensor in column)
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
