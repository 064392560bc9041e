"""Cut or mask indices of single modules: the only code that knows how each layer type stores its channels."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from deploypipe.errors import PlanError
from deploypipe.pruning.attention import SlimAttention
from deploypipe.records import Edit, Side

Sides = dict[Side, tuple[int, ...]]
_ATTRIBUTE = "@"  # side "@num_heads": an attribute that holds the number of the indices


def is_depthwise(module: nn.Module) -> bool:
    """One filter a channel: input and output channel i are the same structure."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def has_two_sides(module: nn.Module) -> bool:
    """Whether inputs and outputs are separate structures; all other layers are edited on their "out" side."""
    return isinstance(module, nn.Linear | _ConvNd) and not is_depthwise(module)


def out_tensor(module: nn.Module) -> tuple[str, int] | None:
    """The tensor and its axis that hold a layer's outputs; None for modules whose tensors are cut one by one."""
    axis = 0
    match module:
        case nn.Embedding():
            axis = 1
        case _ConvTransposeNd() if not is_depthwise(module):
            axis = 1
        case nn.Linear() | _ConvNd() | nn.GroupNorm() | nn.PReLU():
            pass
        case nn.LayerNorm() | nn.RMSNorm() if len(module.normalized_shape) == 1:
            pass
        case _NormBase():
            return ("weight", 0) if module.affine else ("running_mean", 0)
        case _:
            return None
    has_weight = "weight" in module._parameters  # a parametrization computes it from others
    return ("weight", axis) if has_weight or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) else None


def width(module: nn.Module, side: Side) -> int | None:
    """Number of indices on that side, or None when modules of this type do not have it."""
    match module, side:
        case nn.Linear(), "in" | "out":
            return module.in_features if side == "in" else module.out_features
        case _ConvNd(), "in" | "out":
            return module.in_channels if side == "in" else module.out_channels
        case _NormBase(), "out":
            return module.num_features
        case nn.GroupNorm(), "out":
            return module.num_channels
        case ((nn.LayerNorm() | nn.RMSNorm()), "out") if len(module.normalized_shape) == 1:
            return module.normalized_shape[0]
        case nn.PReLU(), "out":
            return module.num_parameters
        case nn.Embedding(), "out":
            return module.embedding_dim
    name, _, axis = side.rpartition(".")
    tensor = getattr(module, name, None) if axis.isdigit() else None
    return tensor.shape[int(axis)] if isinstance(tensor, Tensor) and int(axis) < tensor.dim() else None


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
    """Remove the indices of every edit from `model`, in place.

    A tensor that several modules share is cut once and stays shared. Afterwards the modules' own fields (channels,
    features, groups, num_heads, ...) say what is left.
    """
    by_module = {name: sides for name, sides in edits_by_module(edits).items() if any(sides.values())}
    for name in by_module:
        if type(_find(model, name)) is nn.MultiheadAttention:
            _replace_(model, name, SlimAttention.of(model.get_submodule(name)))  # type: ignore[arg-type]
    modules = {name: _find(model, name) for name in by_module}
    cuts: dict[int, tuple[Tensor, dict[int, list[int]]]] = {}
    for name, sides in by_module.items():
        for side, removed in sides.items():
            for tensor, axis, gone in _tensor_cuts(name, modules[name], side, removed):
                cuts.setdefault(id(tensor), (tensor, {}))[1][axis] = gone
    for name, sides in by_module.items():
        _count_(modules[name], sides)
    owners = _owners(model)
    for key, (tensor, axes) in cuts.items():
        new = _without(tensor, axes)
        for module, local in owners[key]:
            setattr(module, local, new)


def sizes_after(model: nn.Module, edits: Iterable[Edit]) -> tuple[int, dict[str, float]]:
    """(parameters of the whole model, share of its weights that each edited module keeps) once the edits are done."""
    left = {id(p): float(p.numel()) for p in model.parameters()}
    before = dict(left)
    axes: dict[tuple[int, int], int] = {}
    shares: dict[str, float] = {}
    for name, sides in edits_by_module(edits).items():
        module = _find(model, name)
        cuts = [cut for side, removed in sides.items() for cut in _tensor_cuts(name, module, side, removed)]
        for tensor, axis, gone in cuts:
            if id(tensor) in left and (id(tensor), axis) not in axes:  # a shared one is cut once
                axes[id(tensor), axis] = len(gone)
                left[id(tensor)] *= 1 - len(gone) / tensor.shape[axis]
        weights = {id(tensor) for tensor, _, _ in cuts if id(tensor) in left and tensor.dim() > 1}
        if weights:
            shares[name] = min(left[key] / before[key] for key in weights)
    return round(sum(left.values())), shares


def mask_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Zero, in place, every weight of the removed indices; widths stay as they are.

    A norm that looks at all channels then looks at those that stay.
    """
    for name, sides in edits_by_module(edits).items():
        module = _find(model, name)
        if looks_across(module):
            _narrow_(name, module, sides)
            continue
        for side, removed in sides.items():
            for tensor, axis, gone in _masked_parts(name, module, side, removed):
                tensor.data.index_fill_(axis, torch.tensor(gone, device=tensor.device), 0)


def replace_by_identity_(model: nn.Module, names: Iterable[str]) -> None:
    """Put `nn.Identity` where the named modules were."""
    for name in names:
        _find(model, name)
        _replace_(model, name, nn.Identity())


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _find(model: nn.Module, name: str) -> nn.Module:
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


def _tensor_cuts(
    name: str, module: nn.Module, side: Side, removed: Collection[int]
) -> list[tuple[Tensor, int, list[int]]]:
    """(tensor, axis, indices) that one side of one module is stored in."""
    if side.startswith(_ATTRIBUTE) or not removed:
        return []
    total = width(module, side)
    if total is None:
        raise PlanError(f"module {name!r} is a {type(module).__name__}, whose {side!r} cannot be cut; make a new plan")
    if min(removed) < 0 or max(removed) >= total or len(removed) >= total:
        raise PlanError(f"the plan removes {len(removed)} of the {total} {side} channels of {name!r}; make a new plan")
    gone = sorted(removed)
    if side not in ("in", "out"):
        local, _, number = side.rpartition(".")
        return [(getattr(module, local), int(number), gone)]
    if isinstance(module, nn.Linear | _ConvNd):
        return _mixer_cuts(name, module, side, gone)
    axis = 1 if isinstance(module, nn.Embedding) else 0
    tensors = [getattr(module, local, None) for local in ("weight", "bias", "running_mean", "running_var")]
    return [(tensor, axis, gone) for tensor in tensors if isinstance(tensor, Tensor)]


def _mixer_cuts(
    name: str, module: nn.Linear | _ConvNd, side: Side, gone: list[int]
) -> list[tuple[Tensor, int, list[int]]]:
    cuts = [(module.bias, 0, gone)] if module.bias is not None and side == "out" else []
    if _is_first_axis(module, side):
        return [(module.weight, 0, gone), *cuts]
    columns = _common_columns(name, module, side, gone)
    return [(module.weight, 1, columns), *cuts] if columns else cuts


def _is_first_axis(module: nn.Linear | _ConvNd, side: Side) -> bool:
    """The weight is (out, in / groups, ...), transposed (in, out / groups, ...)."""
    return is_depthwise(module) or (side == "out") != isinstance(module, _ConvTransposeNd)


def _by_group(gone: Iterable[int], per_group: int) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for index in gone:
        groups[index // per_group].append(index % per_group)
    return groups


def _common_columns(name: str, module: nn.Linear | _ConvNd, side: Side, gone: list[int]) -> list[int]:
    """What goes from the second axis of the weight, which all groups of a convolution share."""
    per_group = filters_per_group(module, side)
    if per_group is None:
        return gone
    assert isinstance(module, _ConvNd)
    groups = _by_group(gone, per_group)
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
    """Bring the fields in which a module keeps its sizes up to date."""
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
            if module.num_groups > 1:  # whole groups go
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
        if side.startswith(_ATTRIBUTE):
            name = side.removeprefix(_ATTRIBUTE)
            old = getattr(module, name)
            setattr(module, name, (old[0] - len(removed),) if isinstance(old, tuple) else old - len(removed))


def _count_convolution_(module: _ConvNd, sides: Sides) -> None:
    reads, writes = (sides.get(side, ()) for side in ("in", "out"))
    per_group = filters_per_group(module, "in")
    if is_depthwise(module):
        module.groups -= len(writes)
        reads = writes
    elif per_group is not None:  # whole groups may have gone
        module.groups -= sum(len(gone) == per_group for gone in _by_group(reads, per_group).values())
    module.in_channels -= len(reads)
    module.out_channels -= len(writes)


def _masked_parts(
    name: str, module: nn.Module, side: Side, removed: Collection[int]
) -> list[tuple[Tensor, int, list[int]]]:
    """Parameters, or views of them, and what to zero there. Running statistics stay: zeros would be divided by."""
    if isinstance(module, _ConvNd) and not _is_first_axis(module, side) and filters_per_group(module, side):
        groups = module.weight.view(module.groups, -1, *module.weight.shape[1:])
        per_group = filters_per_group(module, side) or 1
        parts = [(groups[g], 1, columns) for g, columns in _by_group(removed, per_group).items()]
        return parts + ([(module.bias, 0, sorted(removed))] if module.bias is not None and side == "out" else [])
    if isinstance(module, ParametrizationList):  # a direction of zeros has no norm to divide by; its readers are masked
        return []
    return [cut for cut in _tensor_cuts(name, module, side, removed) if isinstance(cut[0], nn.Parameter)]


def looks_across(module: nn.Module) -> bool:
    """Whether a layer without layers in it treats its channels together, as layer norms do."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    is_leaf = next(module.children(), None) is None
    known = nn.Linear | _ConvNd | _NormBase | nn.Embedding | nn.PReLU | nn.MultiheadAttention
    return is_leaf and not isinstance(module, known) and all(p.dim() == 1 for p in module.parameters())


def _narrow_(name: str, module: nn.Module, sides: Sides) -> None:
    """Let the module see only the channels that stay, and give zeros for the others."""
    side, removed = next((s, gone) for s, gone in sides.items() if not s.startswith(_ATTRIBUTE))
    total = width(module, side)
    assert total is not None
    cut_(nn.ModuleDict({"norm": module}), [Edit(module="norm", side=s, removed=gone) for s, gone in sides.items()])
    keep = torch.tensor([i for i in range(total) if i not in set(removed)])

    def before(_m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        axis = 1 if isinstance(module, nn.GroupNorm) or x.shape[-1] != total else -1
        return (x.index_select(axis, keep.to(x.device)), *rest)

    def after(_m: nn.Module, _a: tuple[Any, ...], output: Tensor) -> Tensor:
        axis = 1 if isinstance(module, nn.GroupNorm) or output.shape[-1] != len(keep) else output.dim() - 1
        shape = [*output.shape[:axis], total, *output.shape[axis + 1 :]]
        return output.new_zeros(shape).index_copy(axis, keep.to(output.device), output)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
