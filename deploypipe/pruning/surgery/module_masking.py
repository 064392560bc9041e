"""Mask indices instead of cutting them: the masked network computes what the cut one must compute."""

from collections.abc import Collection, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from deploypipe.errors import PlanError
from deploypipe.pruning.modules.axis_reductions import is_statistic, narrow_
from deploypipe.pruning.modules.hook_computed_weights import make_plain_
from deploypipe.pruning.modules.module_kinds import ATTRIBUTE, filters_per_group, normalizes_over_channels, width
from deploypipe.pruning.surgery.module_slicing import (
    Sides,
    by_group,
    cut_,
    edits_by_module,
    find_module,
    is_first_axis,
    tensor_cuts,
)
from deploypipe.records import Edit, Side


def mask_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Set every weight of the removed indices to zero, in place; widths do not change.

    Norms, and operations that take a statistic over channels, then read only the channels that stay.
    """
    by_module = edits_by_module(edits)
    make_plain_(find_module(model, name) for name in by_module)
    for name, sides in by_module.items():
        module = find_module(model, name)
        if normalizes_over_channels(module):
            _narrow_(name, module, sides)
            continue
        for side, removed in sides.items():
            for tensor, axis, gone in _masked_parts(name, module, side, removed):
                tensor.data.index_fill_(axis, torch.tensor(gone, device=tensor.device), 0)
    seen = {name: {s: gone for s, gone in sides.items() if is_statistic(s)} for name, sides in by_module.items()}
    if any(seen.values()):
        narrow_(model, seen)


def _masked_parts(
    name: str, module: nn.Module, side: Side, removed: Collection[int]
) -> list[tuple[Tensor, int, list[int]]]:
    """(parameter or view, axis, indices to zero). Running statistics stay, because a norm divides by them."""
    if isinstance(module, _ConvNd) and not is_first_axis(module, side) and filters_per_group(module, side):
        groups = module.weight.view(module.groups, -1, *module.weight.shape[1:])
        per_group = filters_per_group(module, side) or 1
        parts = [(groups[g], 1, columns) for g, columns in by_group(removed, per_group).items()]
        return parts + ([(module.bias, 0, sorted(removed))] if module.bias is not None and side == "out" else [])
    return [cut for cut in tensor_cuts(name, module, side, removed) if isinstance(cut[0], nn.Parameter)]


def _narrow_(name: str, module: nn.Module, sides: Sides) -> None:
    """Make the module read only the channels that stay and return zeros for the others."""
    side, removed = next((s, gone) for s, gone in sides.items() if not s.startswith(ATTRIBUTE))
    total = width(module, side)
    assert total is not None
    small = deepcopy(module)
    cut_(nn.ModuleDict({"norm": small}), [Edit(module="norm", side=s, removed=gone) for s, gone in sides.items()])
    keep = torch.tensor([i for i in range(total) if i not in set(removed)])

    def narrowed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = keep.to(x.device)
        for axis in (x.dim() - 1, 1):  # channels last or first: only the layer knows which
            if x.shape[axis] == total:
                try:
                    output: Tensor = small(x.index_select(axis, index), *args, **kwargs)
                except RuntimeError:
                    continue
                return output.new_zeros(x.shape).index_copy(axis, index, output)
        raise PlanError(f"{name!r} does not accept {total} channels on its second or last axis; make a new plan")

    module.forward = narrowed
    module.register_forward_hook(lambda *_: None)  # so PyTorch's transformer layers do not read its weights
