"""Cut indices out of single modules: the only code that knows how each layer type stores its channels."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from deploypipe.errors import PlanError
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.modules.hook_computed_weights import make_plain_
from deploypipe.pruning.modules.module_kinds import ATTRIBUTE, filters_per_group, is_depthwise, is_stored, width
from deploypipe.pruning.surgery.slim_attention import SlimAttention
from deploypipe.records import Edit, Side

Sides = dict[Side, tuple[int, ...]]


def edits_by_module(edits: Iterable[Edit]) -> dict[str, Sides]:
    """The union of removed indices, per module and side."""
    union: dict[str, dict[Side, set[int]]] = {}
    for edit in edits:
        union.setdefault(edit.module, {}).setdefault(edit.side, set()).update(edit.removed)
    return {name: {side: tuple(sorted(gone)) for side, gone in sides.items()} for name, sides in union.items()}


def cut_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Remove the indices of every edit from `model`, in place.

    A tensor that several modules share is cut once and stays shared. The modules' own fields (channels, features,
    groups, num_heads, ...) are updated.
    """
    by_module = {name: sides for name, sides in edits_by_module(edits).items() if any(sides.values())}
    make_plain_(find_module(model, name) for name in by_module)
    for name in by_module:
        if type(find_module(model, name)) is nn.MultiheadAttention:
            replace_module_(model, name, SlimAttention.of(model.get_submodule(name)))  # type: ignore[arg-type]
    modules = {name: find_module(model, name) for name in by_module}
    cuts: dict[int, tuple[Tensor, dict[int, list[int]]]] = {}
    for name, sides in by_module.items():
        for side, removed in sides.items():
            for tensor, axis, gone in tensor_cuts(name, modules[name], side, removed):
                cuts.setdefault(id(tensor), (tensor, {}))[1][axis] = gone
    for name, sides in by_module.items():
        _count_(modules[name], sides)
    owners = _owners(model)
    for key, (tensor, axes) in cuts.items():
        new = _without(tensor, axes)
        for module, local in owners[key]:
            setattr(module, local, new)


def sizes_after(model: nn.Module, edits: Iterable[Edit]) -> tuple[int, dict[str, float]]:
    """(parameters of the whole model, remaining share of each edited parameter) after the edits."""
    edits = list(edits)
    computed = {edit.module for edit in edits if is_parametrized(find_module(model, edit.module))}
    if computed:  # cutting makes them plain
        model = copied(model)
        make_plain_(find_module(model, name) for name in computed)
    names = {id(p): name for name, p in model.named_parameters()}
    left = {id(p): float(p.numel()) for p in model.parameters()}
    axes: dict[tuple[int, int], int] = {}
    shares: dict[str, float] = {}
    for name, sides in edits_by_module(edits).items():
        module = find_module(model, name)
        cuts = [cut for side, removed in sides.items() for cut in tensor_cuts(name, module, side, removed)]
        for tensor, axis, gone in cuts:
            if id(tensor) in left and (id(tensor), axis) not in axes:  # a shared one is cut once
                axes[id(tensor), axis] = len(gone)
                left[id(tensor)] *= 1 - len(gone) / tensor.shape[axis]
                shares[names[id(tensor)]] = left[id(tensor)] / tensor.numel()
    return round(sum(left.values())), shares


def forget_caches_(model: nn.Module) -> None:
    """Switch to training mode and back: some networks drop values cached for evaluation when they do that."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    for module, flag in flags:
        module.training = flag


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def find_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(f"the plan edits module {name!r}, which the model does not have; make a new plan") from error


def _owners(model: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners[id(tensor)].append((module, local))
    return owners


def tensor_cuts(
    name: str, module: nn.Module, side: Side, removed: Collection[int]
) -> list[tuple[Tensor, int, list[int]]]:
    """(tensor, axis, indices) for every tensor that stores one side of one module."""
    if not is_stored(side) or not removed:
        return []
    total = width(module, side)
    if total is None:
        raise PlanError(f"module {name!r} is a {type(module).__name__}; {side!r} of it cannot be cut; make a new plan")
    if min(removed) < 0 or max(removed) >= total or len(removed) >= total:
        raise PlanError(f"the plan removes {len(removed)} of the {total} {side} channels of {name!r}; make a new plan")
    gone = sorted(removed)
    if side not in ("in", "out"):
        local, _, number = side.rpartition(".")
        return [(getattr(module, local), int(number), gone)]
    if isinstance(module, nn.Linear | _ConvNd):
        return _linear_cuts(name, module, side, gone)
    axis = 1 if isinstance(module, nn.Embedding) else 0
    tensors = [getattr(module, local, None) for local in ("weight", "bias", "running_mean", "running_var")]
    return [(tensor, axis, gone) for tensor in tensors if isinstance(tensor, Tensor)]


def _linear_cuts(
    name: str, module: nn.Linear | _ConvNd, side: Side, gone: list[int]
) -> list[tuple[Tensor, int, list[int]]]:
    cuts = [(module.bias, 0, gone)] if module.bias is not None and side == "out" else []
    if is_first_axis(module, side):
        return [(module.weight, 0, gone), *cuts]
    columns = _common_columns(name, module, side, gone)
    return [(module.weight, 1, columns), *cuts] if columns else cuts


def is_first_axis(module: nn.Linear | _ConvNd, side: Side) -> bool:
    """The weight is (out, in / groups, ...), transposed (in, out / groups, ...)."""
    return is_depthwise(module) or (side == "out") != isinstance(module, _ConvTransposeNd)


def by_group(gone: Iterable[int], per_group: int) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for index in gone:
        groups[index // per_group].append(index % per_group)
    return groups


def _common_columns(name: str, module: nn.Linear | _ConvNd, side: Side, gone: list[int]) -> list[int]:
    """The indices to remove from the second axis of the weight, which all groups of a convolution share."""
    per_group = filters_per_group(module, side)
    if per_group is None:
        return gone
    assert isinstance(module, _ConvNd)
    groups = by_group(gone, per_group)
    left = [groups.get(g, []) for g in range(module.groups) if len(groups.get(g, [])) < per_group]
    if any(columns != left[0] for columns in left):
        raise PlanError(f"the groups of {name!r} would lose different channels; make a new plan")
    return left[0]


def _without(tensor: Tensor, axes: Mapping[int, list[int]]) -> Tensor:
    new = tensor.detach()
    for axis, gone in axes.items():
        keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
        keep[gone] = False
        new = new.index_select(axis, keep.nonzero()[:, 0].to(tensor.device))
    new = new.contiguous()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _count_(module: nn.Module, sides: Sides) -> None:
    """Update the fields in which a module keeps its sizes."""
    _count_attributes_(module, sides)
    if isinstance(module, _ConvNd):
        _count_convolution_(module, sides)
        return
    gone = {side: len(sides.get(side, ())) for side in ("in", "out")}
    match module:
        case nn.Linear():
            module.in_features -= gone["in"]
            module.out_features -= gone["out"]
        case _NormBase():
            module.num_features -= gone["out"]
        case nn.GroupNorm():
            if module.num_groups > 1:  # whole groups are removed
                module.num_groups -= gone["out"] * module.num_groups // module.num_channels
            module.num_channels -= gone["out"]
        case nn.LayerNorm() | nn.RMSNorm() if gone["out"]:
            module.normalized_shape = (module.normalized_shape[0] - gone["out"],)
        case nn.PReLU():
            module.num_parameters -= gone["out"]
        case nn.Embedding():
            module.embedding_dim -= gone["out"]


def _count_attributes_(module: nn.Module, sides: Sides) -> None:
    for side, removed in sides.items():
        if side.startswith(ATTRIBUTE):
            name, _, place = side.removeprefix(ATTRIBUTE).partition(".")
            old = getattr(module, name)
            if place:  # one of a list of sizes
                sizes = [size - len(removed) * (str(i) == place) for i, size in enumerate(old)]
                setattr(module, name, type(old)(sizes))
            else:
                setattr(module, name, old - len(removed))


def _count_convolution_(module: _ConvNd, sides: Sides) -> None:
    reads, writes = (sides.get(side, ()) for side in ("in", "out"))
    per_group = filters_per_group(module, "in")
    if is_depthwise(module):
        module.groups -= len(writes)
        reads = writes
    elif per_group is not None:  # whole groups may have been removed
        module.groups -= sum(len(gone) == per_group for gone in by_group(reads, per_group).values())
    module.in_channels -= len(reads)
    module.out_channels -= len(writes)
