"""Convert between a user's batches and a session's named arrays, both ways.

The tensors among a network's inputs are the file's inputs. Each is named by its path: `x`, `extra.0`, `cond.text`.
Numbers, flags, text and None are constants of the file.

The file's output names record how the network packs its outputs, so that a file alone is enough to call
`metric(outputs, target)`. A tensor is `output`; a tuple is `output_0`, `output_1`, ...; a dict keeps its keys. Nested
values have their path, `output_1.0` or `text.hidden`. Fields that are None are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import DataError, ModelError
from deploypipe.networks.batch_trees import path_leaves, tensors
from deploypipe.runtimes import Array

_SINGLE = "output"
_RETURN = "; return a tensor, or tuples and dicts of tensors"


def feed(inputs: Any, input_names: Sequence[str]) -> dict[str, Array]:
    """One batch of inputs as named arrays: tensors of a mapping by their paths, others by position."""
    if isinstance(inputs, Mapping):
        given = {path: tensor for path, tensor in input_paths(inputs) if path in input_names}
        named = {name: given[name] for name in input_names if name in given}
    else:
        named = dict(zip(input_names, tensors(inputs), strict=False))
    if len(named) < len(input_names):
        absent = ", ".join(name for name in input_names if name not in named)
        raise DataError(f"a batch lacks {absent}; the model file takes {', '.join(input_names)}")
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in named.items()}


def input_paths(inputs: Any, first: Sequence[str] = ()) -> list[tuple[str, Tensor]]:
    """The tensors of one batch of inputs with their paths. first: names for the members of a tuple or list."""
    if isinstance(inputs, Mapping):
        members = [(str(key), value) for key, value in inputs.items()]
    elif isinstance(inputs, (tuple, list)):
        members = list(zip(first, inputs, strict=True)) if first else [(str(i), v) for i, v in enumerate(inputs)]
    else:
        members = [(first[0] if first else "0", inputs)]
    return [
        (leaf.place, leaf.value)
        for name, member in members
        for leaf in path_leaves(name, member)
        if isinstance(leaf.value, Tensor)
    ]


class Outputs(dict[str, Any]):
    """A dict whose entries are attributes too, as the outputs of `transformers` are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model file has no output {name!r}; it has {', '.join(self)}") from None


def name_outputs(outputs: Any) -> dict[str, Tensor]:
    """The network's outputs as named tensors; ModelError if they hold anything but tensors and None."""
    if isinstance(outputs, Tensor):
        return {_SINGLE: outputs}
    named: dict[str, Tensor] = {}
    if is_dataclass(outputs) and not isinstance(outputs, Mapping):
        outputs = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            named |= _flattened(str(key), value)
    elif isinstance(outputs, (tuple, list)):
        for i, value in enumerate(outputs):
            named |= _flattened(f"{_SINGLE}_{i}", value)
    if not named:
        raise ModelError(f"the network returns {type(outputs).__name__}{_RETURN}")
    return named


def _flattened(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if value is None:
        return {}
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}", part) for key, part in value.items()]
    elif isinstance(value, (tuple, list)):
        parts = [(f"{name}.{i}", part) for i, part in enumerate(value)]
    else:
        raise ModelError(f"the network returns {type(value).__name__} as {name!r}{_RETURN}")
    return {key: tensor for path, part in parts for key, tensor in _flattened(path, part).items()}


def repack(output_names: Sequence[str], arrays: Sequence[Array]) -> Any:
    """Pack a session's outputs as the network packs them: the inverse of `name_outputs`.

    Fields that were None, and classes, are lost: see `distillation_loss.with_outputs_class`.
    """
    tree = Outputs()
    for name, array in zip(output_names, arrays, strict=True):
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, Outputs())
        node[last] = torch.from_numpy(array)
    if list(tree) == [_SINGLE]:
        return tree[_SINGLE]
    if all(key == f"{_SINGLE}_{i}" for i, key in enumerate(tree)):
        return tuple(map(_with_tuples, tree.values()))
    return _with_tuples(tree)


def _with_tuples(value: Any) -> Any:
    """Turn entries with numbers as keys into tuples."""
    if not isinstance(value, Outputs):
        return value
    if all(key.isdigit() for key in value):
        return tuple(map(_with_tuples, value.values()))
    return Outputs({key: _with_tuples(part) for key, part in value.items()})
