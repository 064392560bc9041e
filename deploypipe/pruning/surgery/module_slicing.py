"""Cut or mask indices of single modules: the only code that knows how each layer type stores its channels."""

import inspect
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from deploypipe.errors import PlanError
from deploypipe.networks.model_copies import copied
from deploypipe.pruning.surgery.hook_computed_weights import make_plain_
from deploypipe.pruning.surgery.slim_attention import SlimAttention
from deploypipe.pruning.tracing.axis_reductions import is_statistic, narrow_
from deploypipe.pruning.tracing.module_attributes import is_plain
from deploypipe.records import Edit, Names, Side

Sides = dict[Side, tuple[int, ...]]
_ATTRIBUTE = "@"  # side "@num_heads": an attribute that holds the number of the indices


def is_stored(side: Side) -> bool:
    """Whether tensors hold the indices of a side, and not an attribute their number, or an operation what it sees."""
    return not side.startswith(_ATTRIBUTE) and not is_statistic(side)


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
    make_plain_(_find(model, name) for name in by_module)
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
    """(parameters of the whole model, share of each edited parameter that is left) once the edits are done."""
    edits = list(edits)
    computed = {edit.module for edit in edits if is_parametrized(_find(model, edit.module))}
    if computed:  # cutting makes plain weights of them
        model = copied(model)
        make_plain_(_find(model, name) for name in computed)
    names = {id(p): name for name, p in model.named_parameters()}
    left = {id(p): float(p.numel()) for p in model.parameters()}
    axes: dict[tuple[int, int], int] = {}
    shares: dict[str, float] = {}
    for name, sides in edits_by_module(edits).items():
        module = _find(model, name)
        cuts = [cut for side, removed in sides.items() for cut in _tensor_cuts(name, module, side, removed)]
        for tensor, axis, gone in cuts:
            if id(tensor) in left and (id(tensor), axis) not in axes:  # a shared one is cut once
                axes[id(tensor), axis] = len(gone)
                left[id(tensor)] *= 1 - len(gone) / tensor.shape[axis]
                shares[names[id(tensor)]] = left[id(tensor)] / tensor.numel()
    return round(sum(left.values())), shares


def mask_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Zero, in place, every weight of the removed indices; widths stay as they are.

    A norm, or an operation that takes a statistic over channels, then looks at those that stay.
    """
    by_module = edits_by_module(edits)
    make_plain_(_find(model, name) for name in by_module)
    for name, sides in by_module.items():
        module = _find(model, name)
        if normalizes_over_channels(module):
            _narrow_(name, module, sides)
            continue
        for side, removed in sides.items():
            for tensor, axis, gone in _masked_parts(name, module, side, removed):
                tensor.data.index_fill_(axis, torch.tensor(gone, device=tensor.device), 0)
    seen = {name: {s: gone for s, gone in sides.items() if is_statistic(s)} for name, sides in by_module.items()}
    if any(seen.values()):
        narrow_(model, seen)


def forget_caches_(model: nn.Module) -> None:
    """Turning to training and back is where networks drop what they computed from their weights for evaluation."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    for module, flag in flags:
        module.training = flag


class Bypass(nn.Identity):
    """What is left of a removed block: gives its input back, whatever masks come with it.

    returns: as in `Block`. A block that gave a tuple is followed by (input, arguments of these names or None, ...).
    """

    def __init__(self, block: nn.Module, returns: Names | None = None) -> None:
        super().__init__()
        vars(self).update(_facts(block))
        self._returns = returns
        self._names = tuple(inspect.signature(block.forward).parameters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`x`, unchanged."""
        if self._returns is None:
            return x
        given = dict(zip(self._names, (x, *args), strict=False)) | kwargs
        return x, *(given.get(name) for name in self._returns)


def _facts(block: nn.Module) -> dict[str, Any]:
    """Plain values a caller may ask the block for, such as `self_attn.batch_first` or the kind of mask it wants."""
    plain = {name: value for name, value in vars(block).items() if isinstance(value, str | int | float)}
    facts = {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}
    return facts | {name: SimpleNamespace(**_facts(child)) for name, child in block.named_children()}


def replace_by_identity_(model: nn.Module, blocks: Mapping[str, Names | None]) -> None:
    """Let the inputs of modules pass. blocks: name -> what the module gives after its output, as in `Block`."""
    numbered = _numbered(model)
    for name, returns in blocks.items():
        _replace_(model, name, Bypass(_find(model, name), returns))
    left = _numbered(model)
    for kind, modules in numbered.items():
        if len(modules) != len(left.get(kind, modules)):
            # Caches of keys and values ask the first layer of a kind how much they hold: there must be one.
            first = min(left[kind], key=lambda module: module.layer_idx)
            first.layer_idx = min(module.layer_idx for module in modules)


def _numbered(model: nn.Module) -> dict[Any, list[Any]]:
    """Modules that know the number of their layer, by what they share but for it: place, class and kind of mask."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(vars(module).get("layer_idx"), int) and not isinstance(module, Bypass):
            masks = [(n, v) for n, v in vars(module).items() if ("sliding" in n or "layer_type" in n) and is_plain(v)]
            found[re.sub(r"\d+", "#", name, count=1), type(module), repr(masks)].append(module)
    return found


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
    if not is_stored(side) or not removed:
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
            name, _, place = side.removeprefix(_ATTRIBUTE).partition(".")
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
    return [cut for cut in _tensor_cuts(name, module, side, removed) if isinstance(cut[0], nn.Parameter)]


def normalizes_over_channels(module: nn.Module) -> bool:
    """Whether a layer without layers in it treats its channels together: LayerNorm, RMSNorm, by whatever name."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    is_leaf = next(module.children(), None) is None
    known = nn.Linear | _ConvNd | _NormBase | nn.Embedding | nn.PReLU | nn.MultiheadAttention
    own = list(module.parameters())
    return (
        is_leaf
        and not isinstance(module, known)
        and bool(own)
        and all(max(p.shape, default=1) == p.numel() for p in own)
    )


def _narrow_(name: str, module: nn.Module, sides: Sides) -> None:
    """Let the module see only the channels that stay, and give zeros for the others."""
    side, removed = next((s, gone) for s, gone in sides.items() if not s.startswith(_ATTRIBUTE))
    total = width(module, side)
    assert total is not None
    small = deepcopy(module)
    cut_(nn.ModuleDict({"norm": small}), [Edit(module="norm", side=s, removed=gone) for s, gone in sides.items()])
    keep = torch.tensor([i for i in range(total) if i not in set(removed)])

    def narrowed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = keep.to(x.device)
        for axis in (x.dim() - 1, 1):  # channels last or first: the layer knows which it takes
            if x.shape[axis] == total:
                try:
                    output: Tensor = small(x.index_select(axis, index), *args, **kwargs)
                except RuntimeError:
                    continue
                return output.new_zeros(x.shape).index_copy(axis, index, output)
        raise PlanError(f"{name!r} does not take {total} channels on its first or last axis; make a new plan")

    module.forward = narrowed
    module.register_forward_hook(lambda *_: None)  # keeps PyTorch's transformer layers from reading its weights instead
