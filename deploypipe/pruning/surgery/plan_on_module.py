"""The plan that `prune` leaves on the module that it returns, and whether a plan fits a module."""

from typing import Any

from torch import Tensor, nn

from deploypipe.errors import PlanError
from deploypipe.files.json_records import from_plain, to_plain
from deploypipe.networks.fingerprints import structure_fingerprint
from deploypipe.pruning.modules.module_kinds import is_stored, width
from deploypipe.records import PruningPlan

_ATTRIBUTE, _SHAPES = "pruning_plan", "shapes"
_SAVE_FIRST = "save what prune() returned, and change layers after load_pruned()"


def leave_plan_(pruned: nn.Module, plan: PruningPlan) -> None:
    """Set `pruned.pruning_plan`: the plan as plain data, and the shapes of the tensors that it left."""
    setattr(pruned, _ATTRIBUTE, {**to_plain(plan), _SHAPES: _shapes(pruned)})


def plan_of(pruned: nn.Module) -> PruningPlan:
    """The plan that `prune` left on the module. PlanError if there is none, or if a tensor has another shape now."""
    found = getattr(pruned, _ATTRIBUTE, None)
    if not isinstance(found, dict) or not isinstance(found.get(_SHAPES), dict):
        raise PlanError(
            f"this {type(pruned).__name__} holds no plan in .{_ATTRIBUTE}, so it cannot be made again from a dense "
            "network; pass the module that deploypipe.prune() returned, or the plan that it was cut by: plan=..."
        )
    left, now = found[_SHAPES], _shapes(pruned)
    for name in dict.fromkeys((*left, *now)):
        if left.get(name) != now.get(name):
            seen, expected = (_shown(shapes.get(name)) for shapes in (now, left))
            raise PlanError(f"{name!r} has {seen} now, but prune() left it with {expected}; {_SAVE_FIRST}")
    return from_plain(PruningPlan, {key: value for key, value in found.items() if key != _SHAPES}, f".{_ATTRIBUTE}")


def require_fit(pruned: nn.Module, plan: PruningPlan) -> None:
    """Raise PlanError if `plan` was not applied to the module, or if no network could have become it by the plan."""
    if (plan.edits or plan.blocks) and structure_fingerprint(pruned) == plan.model_fingerprint.partition("-")[0]:
        raise PlanError(
            "the plan removes channels or blocks, but this is the network before that; pass what apply_plan() returns"
        )
    modules = dict(pruned.named_modules())
    for edit in plan.edits:
        if any(edit.module == block or edit.module.startswith(f"{block}.") for block in plan.blocks):
            continue
        if edit.module not in modules:
            raise PlanError(f"the plan edits {edit.module!r}, which the module lacks; pass the plan it was cut by")
        left = width(modules[edit.module], edit.side) if is_stored(edit.side) else None
        if left is not None and max(edit.removed, default=0) >= left + len(edit.removed):
            raise PlanError(
                f"the plan removes {len(edit.removed)} {edit.side} channels of {edit.module!r}, up to number "
                f"{max(edit.removed)}, but {left} are left, too few; pass the plan it was cut by"
            )


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _shown(shape: Any) -> str:
    return "no tensor" if shape is None else f"shape {tuple(shape)}"
