"""Build a network again from its config, without memory for weights, and read its sizes."""

import random
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deploypipe.files.exhausted_resources import raise_if_exhausted
from deploypipe.pruning.modules.module_attributes import is_plain, whole_numbers

Field: TypeAlias = tuple[str | int, ...]  # ("text_config", "hidden_sizes", 0)
Fact: TypeAlias = tuple[str, str]  # (tensor, axis), (module, "@attribute"), or the number of tensors
_NUMBER: Fact = ("", "number of tensors")
_LIST = (list, tuple)


class Misfit(Exception):
    """The config cannot describe the network. The message is the reason."""


def is_config(value: Any) -> bool:
    """Whether a value has attributes and to_dict(), as the configs of transformers have."""
    return type(value).__dictoffset__ != 0 and callable(getattr(type(value), "to_dict", None))


def config_parts(config: Any) -> list[Any]:
    return [config, *(part for value in vars(config).values() if is_config(value) for part in config_parts(value))]


class _NoWeights(TorchFunctionMode):
    """Make torch.empty() allocate no memory, since layers create weights with it. Computed tensors are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(kind: type[nn.Module], config: Any, fields: Mapping[Field, int] | None = None) -> nn.Module:
    """Build a network that cannot run, only be inspected, from a copy of the config with these fields.

    Raises Misfit if the config does not accept them, or the class is not built from its config.
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _NoWeights(), torch.no_grad():
            warnings.simplefilter("ignore")
            return kind(with_fields(config, fields or {}))
    except Exception as error:  # whatever the class raises for an unexpected config
        raise_if_exhausted(error)
        raise Misfit(f"{kind.__name__}(config) raises {type(error).__name__}: {error}") from error
    finally:
        random.setstate(state)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def facts_of(model: nn.Module) -> dict[Fact, int]:
    """Sizes of all tensors, and the whole numbers that modules keep."""
    tensors = {**shapes_of(model), **{name: tuple(t.shape) for name, t in model.named_buffers()}}
    facts = {(name, str(axis)): size for name, shape in tensors.items() for axis, size in enumerate(shape)}
    facts[_NUMBER] = len(tensors)
    for name, module in model.named_modules():
        for attribute, value in whole_numbers(module).items():
            if attribute[0] != "_":
                facts[name, f"@{attribute}"] = value
    return facts


def plain_values(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that can be compared (see `is_plain`)."""
    return {n: v for n, v in vars(module).items() if n[0] != "_" and n != "training" and is_plain(v)}


# --- fields -----------------------------------------------------------------------------------------------------------


def fields_of(config: Any, before: Field = ()) -> Iterator[tuple[Field, int | None]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if is_config(value):
            yield from fields_of(value, (*before, name))
        elif isinstance(value, _LIST) and all(type(v) is int for v in value):
            yield from (((*before, name, place), each) for place, each in enumerate(value))
        elif value is None or type(value) is int:
            yield (*before, name), value


def with_fields(config: Any, fields: Mapping[Field, int]) -> Any:
    new = deepcopy(config)
    for field, value in fields.items():
        set_field_(new, field, value)
    return new


def set_field_(config: Any, field: Field, value: int) -> None:
    *path, last = field
    if isinstance(last, int):
        *path, name = path
        for step in path:
            config = getattr(config, str(step))
        old = getattr(config, str(name))
        setattr(config, str(name), type(old)(value if i == last else v for i, v in enumerate(old)))
        return
    for step in path:
        config = getattr(config, str(step))
    setattr(config, last, value)


def value_of(config: Any, field: Field) -> int:
    return next(value for name, value in fields_of(config) if name == field and value is not None)


def dotted(field: Field) -> str:
    return ".".join(map(str, field))
