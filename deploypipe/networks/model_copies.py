"""Copy networks, with any objects that their modules keep in attributes."""

from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.files.exhausted_resources import raise_if_exhausted


def copied(model: nn.Module, known: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Tensors that a forward pass left in attributes are copied without their history.

    known: object id -> its replacement in the copy, the memo of `copy.deepcopy`. Raises ModelError, which names the
    attribute, if something in the network cannot be copied (an open file, a lock).
    """
    known = {} if known is None else known
    for held in _held_apart(model):
        if isinstance(held, ModuleType):
            known.setdefault(id(held), held)
        elif isinstance(held, OrderedDict):
            known.setdefault(id(held), OrderedDict())
        elif not held.is_leaf:  # PyTorch copies leaves only
            known.setdefault(id(held), held.detach().clone())
    before = dict(known)
    try:
        return deepcopy(model, known)
    except Exception as error:  # whatever an object in an attribute raises
        raise_if_exhausted(error)
        said = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"the network cannot be copied: {_culprit(model, before)} ({type(error).__name__}: {said}); "
            "keep it outside of the network, or give its class a __deepcopy__"
        ) from error


def _held_apart(model: nn.Module) -> Iterator[Any]:
    """All tensors, packages and empty ordered dicts in attributes of modules and other objects, also inside containers.

    Every module holds ten dicts for hooks, which are nearly always empty: deepcopy spends most of its time on them.
    """
    todo: list[Any] = [model]
    seen: dict[int, Any] = {}
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if issubclass(type(value), Tensor | ModuleType) or (type(value) is OrderedDict and not value):
            yield value
        else:
            todo += _contents(value)


def _contents(value: Any) -> list[Any]:
    """The parts of an object, read without running code of its class."""
    kind = type(value)
    if issubclass(kind, type):
        return []
    found: list[Any] = []
    for container in (list, tuple, set, frozenset):
        if issubclass(kind, container):
            found += container.__iter__(value)
    if issubclass(kind, dict):
        found += dict.values(value)
    try:
        return [*found, *object.__getattribute__(value, "__dict__").values()]
    except AttributeError:  # numbers, texts, objects with slots
        return found


def _culprit(model: nn.Module, known: dict[int, Any]) -> str:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            try:
                deepcopy(value, dict(known))
            except Exception as error:  # as above
                raise_if_exhausted(error)
                return f"{f'{name}.' if name else ''}{attribute} is a {type(value).__name__}"
    return f"a {type(model).__name__}"
