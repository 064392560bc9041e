"""Prove that a config describes a pruned network: the network built from it has the same tensors and values."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deploypipe.pruning.model_config.build_from_config import (
    Field,
    Misfit,
    build,
    config_parts,
    plain_values,
    shapes_of,
    with_fields,
)
from deploypipe.pruning.model_config.forward_reads import Reads
from deploypipe.pruning.modules.bypass import Bypass
from deploypipe.pruning.modules.module_attributes import are_equal, is_plain


def difference(kind: type[nn.Module], config: Any, values: Mapping[Field, int], pruned: nn.Module, reads: Reads) -> str:
    """Why the network built from the config with these values is not the pruned one; "" if it is."""
    try:
        new = with_fields(config, values)
        built = build(kind, _reloaded(new))
    except Misfit as error:
        return str(error)
    ours, theirs = shapes_of(pruned), shapes_of(built)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            return f"no values of its fields give {name!r} the shape {ours.get(name)}, but {theirs.get(name)}"
    modules = dict(built.named_modules())
    for name, module in pruned.named_modules():
        if name in modules:
            if reason := _differs(name, module, modules[name], reads):
                return reason
        elif not isinstance(module, Bypass):
            return f"{name!r} is not in a {kind.__name__} built from it"
    return _misreads(config, new, reads)


def _misreads(config: Any, new: Any, reads: Reads) -> str:
    """Report a changed field that forward() reads: the pruned network was tried with its old value only."""
    for part, other in zip(config_parts(config), config_parts(new), strict=True):
        for name in sorted(reads.config & {*vars(part), *dir(type(part))}):
            if not are_equal(_safely(part, name), _safely(other, name)):
                return f"forward() reads config.{name}, which was tried only with the dense network's value"
    return ""


def _differs(name: str, ours: nn.Module, theirs: nn.Module, reads: Reads) -> str:
    """Compare buffers that are not in the state dict, and the values that forward() reads."""
    if type(ours) is not type(theirs):
        return f"{name!r} is a {type(ours).__name__} now"
    is_torch = type(ours).__module__.startswith("torch.")
    own, other = plain_values(ours), plain_values(theirs)
    pairs = [(key, own[key], other[key]) for key in own if key in other and (is_torch or key in reads.attributes)]
    loaded = theirs.state_dict()
    pairs += [(key, value, theirs._buffers.get(key)) for key, value in ours._buffers.items() if key not in loaded]
    for key, mine, built in pairs:
        if not are_equal(mine, built):
            return f"{key!r} of {name!r} differs in a network built from it"
    return ""


def _reloaded(config: Any) -> Any:
    """The config as it would be loaded from a file, if its class can do that."""
    read = getattr(type(config), "from_dict", None)
    try:
        return read(config.to_dict()) if read else config
    except Exception as error:  # validation of whatever kind
        raise Misfit(f"{type(config).__name__}.from_dict() raises {type(error).__name__}: {error}") from error


def _safely(config: Any, name: str) -> Any:
    """A plain value of the config; None for methods, and for properties that raise."""
    try:
        value = getattr(config, name)
    except Exception:  # a property of a class we do not know
        return None
    return value if is_plain(value) else None
