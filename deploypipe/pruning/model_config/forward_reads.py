"""Find the attributes that forward methods may read, of their module and of its config, from the bytecode."""

import dis
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

_FOREIGN = {"torch", *sys.stdlib_module_names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """Names that code reachable from forward() may look up. It errs on the side of more names."""

    attributes: frozenset[str]
    config: frozenset[str]  # attributes of names that end in "config"


def reads_of(classes: Iterable[type[nn.Module]]) -> Reads:
    """Follow forward() of every class except torch's own through the methods and functions that it names.

    Functions found in tables at run time and classes created there are not followed.
    """
    attributes: set[str] = set()
    config: set[str] = set()
    for cls in {cls for cls in classes if not cls.__module__.startswith("torch.")}:
        todo, seen = _methods(cls, {"forward"}), set[FunctionType]()
        while todo:
            function = todo.pop()
            if function in seen:
                continue
            seen.add(function)
            names, of_config = _names(function.__code__)
            attributes |= names
            config |= of_config
            todo += _methods(cls, names) + _functions(function)
    return Reads(attributes=frozenset(attributes), config=frozenset(config))


def _methods(cls: type[nn.Module], names: Iterable[str]) -> list[FunctionType]:
    found = []
    for name in names:
        value = inspect.getattr_static(cls, name, None)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        found += _own([value])
    return found


def _functions(function: FunctionType) -> list[FunctionType]:
    """Functions that it wraps, closes over or names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    named = [function.__globals__.get(name) for code in _codes(function.__code__) for name in code.co_names]
    return _own([getattr(function, "__wrapped__", None), *cells, *named])


def _own(values: Iterable[Any]) -> list[FunctionType]:
    """The functions that belong neither to PyTorch nor to Python."""
    functions = [value for value in values if isinstance(value, FunctionType)]
    return [f for f in functions if (f.__module__ or "").partition(".")[0] not in _FOREIGN]


@lru_cache(maxsize=10_000)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """(attributes, attributes of a config) that code looks up, by name or by a string constant."""
    names: set[str] = set()
    config: set[str] = set()
    for part in _codes(code):
        owner = ""
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                (config if owner.endswith("config") else names).add(step.argval)
            owner = step.argval if isinstance(step.argval, str) else ""
        texts = {text for text in part.co_consts if isinstance(text, str) and "getattr" in part.co_names}
        names |= texts
        config |= texts
    return frozenset(names), frozenset(config)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
