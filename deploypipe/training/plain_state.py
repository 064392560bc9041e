"""The state of an optimizer or a schedule as text and tensors: checkpoints hold no pickles, which could run code."""

import json
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _MAPPING = "tensor", "tuple", "mapping"


def to_text(state: Any) -> tuple[str, dict[str, Tensor]]:
    """`state` as JSON, and its tensors by their number there.

    TypeError for anything but tensors, numbers, text, None, and lists, tuples and mappings of them.
    """
    tensors: dict[str, Tensor] = {}
    return json.dumps(_encoded(state, tensors)), tensors


def from_text(text: str, tensors: dict[str, Tensor]) -> Any:
    """The state that `to_text` was given."""
    return _decoded(json.loads(text), tensors)


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON has lists, but neither tuples nor keys that are numbers, and no tensors: those are objects of one member."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu()
        return {_TENSOR: name}
    if isinstance(value, list):
        return [_encoded(each, tensors) for each in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(each, tensors) for each in value]}
    if isinstance(value, dict):
        return {_MAPPING: [[_encoded(key, tensors), _encoded(each, tensors)] for key, each in value.items()]}
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a plain value")


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == _TENSOR:
        return torch.clone(tensors[held])
    if kind == _TUPLE:
        return tuple(_decoded(each, tensors) for each in held)
    return {_decoded(key, tensors): _decoded(each, tensors) for key, each in held}
