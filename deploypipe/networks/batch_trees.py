"""Batches, inputs and outputs as trees: nested containers with tensors and other values as leaves.

A container is a tuple, a NamedTuple, a list, a mapping or a dataclass. A rebuilt tree keeps its classes.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """A value of a tree and its place, as Python would write it: `inputs[1]["step"]`."""

    place: str
    value: Any


def leaves(tree: Any, name: str = "inputs") -> Iterator[Leaf]:
    """The leaves in order. name: the name of the tree itself in their places."""
    keys = _keys(tree)
    if keys is None:
        yield Leaf(place=name, value=tree)
        return
    for key, part in zip(keys, _parts(tree), strict=True):
        yield from leaves(part, name + key)


def path_leaves(name: str, tree: Any) -> Iterator[Leaf]:
    """The leaves, with places in the form used in files: `cond.text`, `extra.0`."""
    for leaf in leaves(tree, ""):
        yield Leaf(place=name + re.sub(r"""\["?(.*?)"?\]""", r".\1", leaf.place), value=leaf.value)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with `function` applied to each leaf."""
    if isinstance(tree, Tensor) or _keys(tree) is None:
        return function(tree)
    return _rebuilt(tree, [map_leaves(function, part) for part in _parts(tree)])


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the leaves, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf.value for leaf in leaves(tree) if isinstance(leaf.value, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with `function` applied to each tensor; other leaves are carried through."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def constants_in_lists(tree: Any) -> Any:
    """The same tree with a list for every tuple without tensors: torch's ONNX exporter treats a tuple of None in its
    dynamic shapes as axes, and makes it a list."""
    if isinstance(tree, Tensor) or _keys(tree) is None:
        return tree
    parts = [constants_in_lists(part) for part in _parts(tree)]
    return parts if type(tree) is tuple and not tensors(tree) else _rebuilt(tree, parts)


def as_plain(tree: Any) -> Any:
    """The same tree made of tuples, lists and dicts only, without fields of dataclasses that are None."""
    if isinstance(tree, Tensor) or _keys(tree) is None:
        return tree
    parts = [as_plain(part) for part in _parts(tree)]
    if isinstance(tree, (tuple, list)):
        return parts if isinstance(tree, list) else tuple(parts)
    if isinstance(tree, Mapping):
        return dict(zip(tree, parts, strict=True))
    names = [field.name for field in fields(tree)]
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


def structure(tree: Any) -> tuple[str, ...]:
    """The places of the leaves: equal for two trees of the same structure."""
    return tuple(leaf.place for leaf in leaves(tree))


def same_value(one: Any, other: Any) -> bool:
    """Whether two leaves other than tensors are equal. An object of an unknown class equals only itself."""
    if type(one) is not type(other):
        return False
    if one is None or isinstance(one, (bool, int, float, complex, str, bytes)):
        return bool(one == other) or one is other
    return one is other


def _keys(tree: Any) -> list[str] | None:
    """The key of each part of a container, as Python code; None for a leaf."""
    if isinstance(tree, Tensor):
        return None
    if isinstance(tree, (tuple, list)):
        names: Sequence[str] | None = getattr(tree, "_fields", None)
        return [f".{name}" for name in names] if names else [f"[{i}]" for i in range(len(tree))]
    if isinstance(tree, Mapping):
        return [f'["{key}"]' if isinstance(key, str) else f"[{key!r}]" for key in tree]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [f".{field.name}" for field in fields(tree)]
    return None


def _parts(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return list(tree)
    if isinstance(tree, Mapping):
        return list(tree.values())
    return [getattr(tree, field.name) for field in fields(tree)]


def _rebuilt(tree: Any, parts: list[Any]) -> Any:
    if isinstance(tree, (tuple, list)):
        if hasattr(tree, "_fields"):
            return type(tree)(*parts)
        return parts if isinstance(tree, list) else tuple(parts)
    if isinstance(tree, Mapping):
        new = dict(zip(tree, parts, strict=True))
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return new
        if is_dataclass(tree):  # outputs of transformers, which refuse `update`
            return type(tree)(**new)
        same_class = copy.copy(tree)  # attributes of a class that is not ours stay
        same_class.update(new)
        return same_class
    new_one = copy.copy(tree)
    for field, part in zip(fields(tree), parts, strict=True):
        object.__setattr__(new_one, field.name, part)  # frozen ones too
    return new_one
