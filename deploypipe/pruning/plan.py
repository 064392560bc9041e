"""Decide what goes: scores and widths in, a resolved plan of index edits out."""

import math
from collections.abc import Mapping, Sequence

from deploypipe.errors import PlanError
from deploypipe.pruning.slicing import edits_by_module
from deploypipe.records import ChannelGroup, Edit, GroupCut, PruningPlan, ScoreTable, Structures


def make_plan(
    structures: Structures,
    scores: ScoreTable,
    widths: Mapping[str, int],
    blocks: Sequence[str] = (),
    channel_multiple: int = 1,
) -> PruningPlan:
    """Keep the best-scored `widths[name]` units of each named group, and remove the named blocks.

    Widths are brought to the nearest multiple of `channel_multiple` (halves go up), at least one multiple, never above
    the dense width; a group narrower than one multiple stays whole; heads come in any number. Equal scores: the lower
    index stays. Groups that lie wholly in removed blocks are left out. Group names absent from `widths` stay whole.
    """
    groups = {group.name: group for group in structures.groups}
    _check(structures, groups, scores, widths, blocks)
    cuts: list[GroupCut] = []
    edits: list[Edit] = []
    for group in structures.groups:
        outside = [m for m in group.members if not _is_inside(m.module, blocks)]
        if group.name not in widths or not outside:
            continue
        asked = widths[group.name]
        width, reason = _realised(asked, group.num_units, group.step(channel_multiple))
        ranked = sorted(range(group.num_units), key=lambda i: (-scores.channels[group.name][i], i))
        removed = tuple(sorted(ranked[width:]))
        if not removed and asked == group.num_units:
            continue
        cuts.append(GroupCut(group=group.name, asked=asked, removed=removed, num_units=group.num_units, reason=reason))
        for member in outside:
            gone = tuple(sorted({i for unit in removed for i in member.units[unit]}))
            edits.append(Edit(module=member.module, side=member.side, removed=gone))
    merged = edits_by_module(edits)
    return PruningPlan(
        model_fingerprint=structures.model_fingerprint,
        cuts=tuple(cuts),
        edits=tuple(
            Edit(module=module, side=side, removed=gone)
            for module, sides in merged.items()
            for side, gone in sorted(sides.items())
            if gone
        ),
        blocks=tuple(block.name for block in structures.blocks if block.name in blocks),
    )


def empty_plan(structures: Structures) -> PruningPlan:
    """The plan that removes nothing."""
    return PruningPlan(model_fingerprint=structures.model_fingerprint, cuts=(), edits=(), blocks=())


def _is_inside(module: str, blocks: Sequence[str]) -> bool:
    return any(module == block or module.startswith(f"{block}.") for block in blocks)


def _realised(asked: int, dense: int, multiple: int) -> tuple[int, str]:
    """The width a group gets, and why it is not the one asked for."""
    if asked >= dense:
        return dense, f"has only {dense} channels" if asked > dense else ""
    if dense < multiple:
        return dense, f"stays whole: its {dense} channels are fewer than the target's multiple of {multiple}"
    width = min(max(multiple, (2 * asked + multiple) // (2 * multiple) * multiple), dense)
    if width == asked:
        return width, ""
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
