"""Make a plan: from scores and widths to a list of index edits. Compose two plans into one."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from deploypipe.errors import PlanError
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.modules.module_kinds import is_depthwise
from deploypipe.pruning.surgery.apply_plan import apply_plan, check_fingerprint
from deploypipe.pruning.surgery.check_constraints import require_constraints
from deploypipe.pruning.surgery.module_slicing import edits_by_module
from deploypipe.records import ChannelGroup, Edit, GroupCut, Names, PruningPlan, ScoreTable, Side, Structures


def make_plan(
    structures: Structures,
    scores: ScoreTable,
    widths: Mapping[str, int],
    blocks: Sequence[str] = (),
    channel_multiple: int = 1,
) -> PruningPlan:
    """Keep the best-scored `widths[name]` units of each named group, and remove the named blocks.

    Widths are rounded to the nearest multiple of `channel_multiple` (halves go up): at least one multiple, at most the
    dense width. A group narrower than one multiple stays whole. The number of heads is not rounded. No group gets
    narrower than `structures.constraints` allow. Of equal scores the lower index stays. Groups that lie wholly in
    removed blocks are left out. Groups absent from `widths` stay whole. Raises PlanError for unknown names, and for
    widths and blocks that the constraints do not allow.
    """
    groups = {group.name: group for group in structures.groups}
    _check(structures, groups, scores, widths, blocks)
    cuts: list[GroupCut] = []
    edits: list[Edit] = []
    realised: dict[str, int] = {}
    for group in structures.groups:
        outside = [m for m in group.members if not _is_inside(m.module, blocks)]
        if not outside:
            continue
        asked = widths.get(group.name, group.num_units)
        least = structures.least_width(group, channel_multiple)
        width, reason = _realised(asked, group.num_units, group.step(channel_multiple), least)
        realised[group.name] = width
        if width == asked == group.num_units:
            continue
        ranked = sorted(range(group.num_units), key=lambda i: (-scores.channels[group.name][i], i))
        removed = tuple(sorted(ranked[width:]))
        cuts.append(GroupCut(group=group.name, asked=asked, removed=removed, num_units=group.num_units, reason=reason))
        for member in outside:
            gone = tuple(sorted({i for unit in removed for i in member.units[unit]}))
            edits.append(Edit(module=member.module, side=member.side, removed=gone))
    require_constraints(structures, realised, blocks)
    return PruningPlan(
        model_fingerprint=structures.model_fingerprint,
        cuts=tuple(cuts),
        edits=_merged(edits),
        blocks=tuple(block.name for block in structures.blocks if block.name in blocks),
        returns=_returns(structures),
    )


def empty_plan(structures: Structures) -> PruningPlan:
    """A plan that removes nothing."""
    return PruningPlan(
        model_fingerprint=structures.model_fingerprint, cuts=(), edits=(), blocks=(), returns=_returns(structures)
    )


def _returns(structures: Structures) -> dict[str, Names]:
    return {block.name: block.returns for block in structures.blocks if block.returns is not None}


def compose(first: PruningPlan, second: PruningPlan, dense: nn.Module) -> PruningPlan:
    """One plan for `dense` that does what `first` and then `second` do, bit for bit.

    `second` must have been made for `apply_plan(dense, first)`; raises PlanError if either plan was made for another
    model. If `second` divides a group into other units than `first` left, `cuts` has a row of each plan.
    """
    dense = unwrapped(dense)
    once = apply_plan(dense, first)
    try:
        check_fingerprint(once, second)
    except PlanError as error:
        raise PlanError(f"the second plan does not continue the first one: {error}") from None
    gone = {(module, side): sides[side] for module, sides in edits_by_module(first.edits).items() for side in sides}
    later = [
        Edit(module=e.module, side=side, removed=_dense_indices(e.removed, gone.get((e.module, side), ())))
        for e in second.edits
        for side in _dense_sides(e, dense, once)
    ]
    blocks = tuple(dict.fromkeys((*first.blocks, *second.blocks)))
    return PruningPlan(
        model_fingerprint=first.model_fingerprint,
        cuts=_joined(first.cuts, second.cuts),
        edits=_merged(e for e in (*first.edits, *later) if not _is_inside(e.module, blocks)),
        blocks=blocks,
        returns={**second.returns, **first.returns},
    )


def _dense_indices(removed: Iterable[int], gone: Collection[int]) -> tuple[int, ...]:
    """The dense numbers of indices that are counted after `gone` was removed."""
    removed = tuple(removed)
    left = sorted(set(range(max(removed, default=0) + len(gone) + 1)) - set(gone))
    return tuple(left[i] for i in removed)


def _dense_sides(edit: Edit, dense: nn.Module, once: nn.Module) -> tuple[Side, ...]:
    """A grouped convolution with one channel left per group is depthwise, so its "out" stands for both sides."""
    was, now = dense.get_submodule(edit.module), once.get_submodule(edit.module)
    return ("in", "out") if is_depthwise(now) and not is_depthwise(was) else (edit.side,)


def _joined(first: Sequence[GroupCut], second: Sequence[GroupCut]) -> tuple[GroupCut, ...]:
    """The cuts of both plans in dense units; one row for a group that has the same units in both."""
    later = {cut.group: cut for cut in second}
    rows: list[GroupCut] = []
    for cut in first:
        other = later.get(cut.group)
        if other is None or other.num_units != cut.num_units - len(cut.removed):
            rows.append(cut)
            continue
        del later[cut.group]
        removed = sorted({*cut.removed, *_dense_indices(other.removed, cut.removed)})
        rows.append(replace(cut, asked=other.asked, removed=tuple(removed), reason=other.reason))
    return (*rows, *later.values())


def _merged(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """One edit per side of each module that loses something."""
    return tuple(
        Edit(module=module, side=side, removed=gone)
        for module, sides in edits_by_module(edits).items()
        for side, gone in sorted(sides.items())
        if gone
    )


def _is_inside(module: str, blocks: Sequence[str]) -> bool:
    return any(module == block or module.startswith(f"{block}.") for block in blocks)


def _realised(asked: int, dense: int, multiple: int, least: int) -> tuple[int, str]:
    """The width a group gets, and the reason if it is not the one asked for. least: a multiple, or the dense width."""
    if asked >= dense:
        return dense, f"has only {dense} channels" if asked > dense else ""
    if dense < multiple:
        return dense, f"stays whole: its {dense} channels are fewer than the target's multiple of {multiple}"
    nearest = (2 * asked + multiple) // (2 * multiple) * multiple
    width = min(max(least, nearest), dense)
    if width == asked:
        return width, ""
    if width > max(multiple, nearest):
        return width, f"brought to the {least} that stay at least, as recipe.constraints asks"
    if width % multiple:
        return width, f"stays whole: the next multiple of {multiple} is above its {dense} channels"
    return width, f"brought to a multiple of {multiple} channels, as the target asks"


def _check(
    structures: Structures,
    groups: Mapping[str, ChannelGroup],
    scores: ScoreTable,
    widths: Mapping[str, int],
    blocks: Sequence[str],
) -> None:
    frozen = {(row.kind, row.name): row.reason for row in structures.frozen}
    for name, width in widths.items():
        if name not in groups:
            reason = frozen.get(("channels", name), "there is no such channel group")
            raise PlanError(f"channels of {name!r} cannot be removed: {reason}; use names from structures.groups")
        if width < 1:
            raise PlanError(f"{name!r} cannot keep {width} channels; ask for 1 or more, or remove its block")
        row = scores.channels.get(name)
        if row is None or len(row) != groups[name].num_units or not all(map(math.isfinite, row)):
            raise PlanError(f"scorer {scores.scorer!r} gave no finite score for every unit of {name!r}; score it again")
    for name in blocks:
        if name not in {block.name for block in structures.blocks}:
            reason = frozen.get(("block", name), "there is no such block")
            raise PlanError(f"block {name!r} cannot be removed: {reason}; use names from structures.blocks")
