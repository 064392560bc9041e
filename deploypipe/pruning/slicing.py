"""Cut or mask channel indices of single modules: the only code that knows how each layer type stores its channels."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from deploypipe.errors import PlanError
from deploypipe.records import Edit, Side

Sides = dict[Side, tuple[int, ...]]


def is_depthwise(module: nn.Module) -> bool:
    """One filter a channel: input and output channel i are the same structure."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def has_two_sides(module: nn.Module) -> bool:
    """Whether inputs and outputs are separate structures; all other layers are edited on their "out" side."""
    return isinstance(module, nn.Linear | _ConvNd) and not is_depthwise(module)


def width(module: nn.Module, side: Side) -> int | None:
    """Number of indices on that side, or None when modules of this type cannot be cut."""
    match module:
        case nn.Linear():
            return module.in_features if side == "in" else module.out_features
        case _ConvNd():
            return module.in_channels if side == "in" else module.out_channels
        case _NormBase():
            return module.num_features
        case nn.GroupNorm():
            return module.num_channels
        case nn.LayerNorm() if len(module.normalized_shape) == 1:
            return module.normalized_shape[0]
        case nn.PReLU():
            return module.num_parameters
        case nn.Embedding():
            return module.embedding_dim
    return None


def filters_per_group(module: nn.Module, side: Side) -> int | None:
    """For a grouped convolution, how many indices of that side each group has; None for everything else."""
    if not isinstance(module, _ConvNd) or module.groups == 1 or is_depthwise(module):
        return None
    return (module.in_channels if side == "in" else module.out_channels) // module.groups


def edits_by_module(edits: Iterable[Edit]) -> dict[str, Sides]:
    """The union of removed indices, per module and side."""
    union: dict[str, dict[Side, set[int]]] = {}
    for edit in edits:
        union.setdefault(edit.module, {}).setdefault(edit.side, set()).update(edit.removed)
    return {name: {side: tuple(sorted(gone)) for side, gone in sides.items()} for name, sides in union.items()}


def cut_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Remove the indices of every edit from the modules of `model`, in place; one slice per module and side."""
    for name, sides in edits_by_module(edits).items():
        module = _find(model, name)
        for side, removed in sides.items():
            _cut_side_(name, module, side, removed)


def mask_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Zero, in place, what every consumer reads from the removed indices; widths stay as they are."""
    for name, sides in edits_by_module(edits).items():
        module = _find(model, name)
        if "in" in sides and has_two_sides(module):
            _mask_input_(module, sides["in"])


def replace_by_identity_(model: nn.Module, names: Iterable[str]) -> None:
    """Put `nn.Identity` where the named modules were."""
    for name in names:
        _find(model, name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"the plan edits module {name!r}, which the model does not have; make a new plan") from error


def _cut_side_(name: str, module: nn.Module, side: Side, removed: Collection[int]) -> None:
    total = width(module, side)
    if total is None:
        raise PlanError(f"module {name!r} is a {type(module).__name__}, which cannot be cut; make a new plan")
    if not removed:
        return
    if min(removed) < 0 or max(removed) >= total or len(removed) >= total:
        raise PlanError(f"the plan removes {len(removed)} of the {total} {side} channels of {name!r}; make a new plan")
    gone = set(removed)
    keep = [i for i in range(total) if i not in gone]
    match module:
        case nn.Linear():
            _cut_linear_(module, side, keep)
        case _ConvNd():
            _cut_conv_(name, module, side, keep)
        case _:
            _cut_channelwise_(name, module, keep)


def _cut_linear_(module: nn.Linear, side: Side, keep: list[int]) -> None:
    if side == "in":
        _take_(module, ("weight",), 1, keep)
        module.in_features = len(keep)
    else:
        _take_(module, ("weight", "bias"), 0, keep)
        module.out_features = len(keep)


def _cut_conv_(name: str, module: _ConvNd, side: Side, keep: list[int]) -> None:
    is_transposed = isinstance(module, _ConvTransposeNd)
    if is_depthwise(module):
        _take_(module, ("weight", "bias"), 0, keep)
        module.in_channels = module.out_channels = module.groups = len(keep)
        return
    per_group = filters_per_group(module, side)
    if per_group is not None:
        shares = [tuple(i % per_group for i in keep if i // per_group == g) for g in range(module.groups)]
        if len(set(shares)) > 1:
            raise PlanError(f"the groups of {name!r} would lose different channels; make a new plan")
    # The weight is (out, in / groups, ...), transposed (in, out / groups, ...): all groups share the second axis.
    is_first_axis = (side == "out") != is_transposed
    share = keep if is_first_axis or per_group is None else [i for i in keep if i < per_group]
    _take_(module, ("weight",), 0 if is_first_axis else 1, share)
    if side == "in":
        module.in_channels = len(keep)
    else:
        _take_(module, ("bias",), 0, keep)
        module.out_channels = len(keep)


def _cut_channelwise_(name: str, module: nn.Module, keep: list[int]) -> None:
    match module:
        case _NormBase():
            _take_(module, ("weight", "bias", "running_mean", "running_var"), 0, keep)
            module.num_features = len(keep)
        case nn.GroupNorm():
            if module.num_groups != module.num_channels:
                raise PlanError(f"{name!r} normalises over groups of channels, whose statistics would change")
            _take_(module, ("weight", "bias"), 0, keep)
            module.num_groups = module.num_channels = len(keep)
        case nn.LayerNorm():
            _take_(module, ("weight", "bias"), 0, keep)
            module.normalized_shape = (len(keep),)
        case nn.PReLU():
            _take_(module, ("weight",), 0, keep)
            module.num_parameters = len(keep)
        case nn.Embedding():
            _take_(module, ("weight",), 1, keep)
            module.embedding_dim = len(keep)


def _take_(module: nn.Module, names: Iterable[str], dim: int, keep: list[int]) -> None:
    for name in names:
        old = getattr(module, name, None)
        if not isinstance(old, Tensor):
            continue
        new = old.detach().index_select(dim, torch.tensor(keep, device=old.device)).contiguous()
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _mask_input_(module: nn.Module, removed: Collection[int]) -> None:
    assert isinstance(module, nn.Linear | _ConvNd)
    index = torch.tensor(removed, device=module.weight.device)
    per_group = filters_per_group(module, "in")
    with torch.no_grad():
        if isinstance(module, _ConvTransposeNd):
            module.weight[index] = 0
        elif per_group is None:
            module.weight[:, index] = 0
        else:
            outs = len(module.weight) * per_group // (width(module, "in") or 1)
            for i in removed:
                group = i // per_group
                module.weight[group * outs : (group + 1) * outs, i % per_group] = 0
