"""Read plain attributes of modules.

Values of unknown types are never compared, hashed or converted to bool: `==` of arrays gives an array, a lazy object
starts to compute, and others raise.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Origin = tuple[str, str]  # (module, attribute)
_LISTS = (list, tuple, torch.Size)
_SCALARS = (int, float, str, bool, type(None))


class KeptSize(int):
    """A number that knows the attribute it was read from, until something is computed with it."""

    origin: Origin


def mark_sizes_(model: nn.Module) -> None:
    """Replace every whole number in a module's attributes by a `KeptSize`."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if type(value) is int:
                size = KeptSize(value)
                size.origin = (name, attribute)
                vars(module)[attribute] = size


def whole_number(value: Any) -> int | None:
    """The value if its type is exactly int or one of NumPy's integers, else None."""
    return int(value) if type(value) in (int, KeptSize) or issubclass(type(value), np.integer) else None


def whole_numbers(module: nn.Module) -> dict[str, int]:
    """Attributes that hold one whole number."""
    found = {name: whole_number(value) for name, value in vars(module).items()}
    return {name: number for name, number in found.items() if number is not None}


def lists_of_whole_numbers(module: nn.Module) -> dict[str, list[int]]:
    """Attributes that hold a list, a tuple or a torch.Size of nothing but whole numbers."""
    found: dict[str, list[int]] = {}
    for name, value in vars(module).items():
        if type(value) in _LISTS:
            numbers = [whole_number(each) for each in value]
            if value and None not in numbers:
                found[name] = [number for number in numbers if number is not None]
    return found


def is_plain(value: Any) -> bool:
    """Whether `are_equal` knows the type: numbers, texts, None, tensors, arrays, and lists and tuples of them."""
    if type(value) in _LISTS:
        return all(map(is_plain, value))
    return type(value) in _SCALARS or issubclass(type(value), Tensor | np.ndarray | np.generic)


def are_equal(ours: Any, theirs: Any) -> bool:
    """Whether two plain values have the same type and are equal; False for values of other types."""
    if issubclass(type(ours), Tensor) and issubclass(type(theirs), Tensor):
        return not theirs.is_meta and ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.to(ours.dtype))
    if type(ours) is not type(theirs):
        return False
    if type(ours) in _LISTS:
        return len(ours) == len(theirs) and all(map(are_equal, ours, theirs))
    if issubclass(type(ours), np.ndarray | np.generic):
        return bool(np.array_equal(ours, theirs))
    return type(ours) in _SCALARS and bool(ours == theirs)
