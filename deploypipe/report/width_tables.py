"""The widths that a plan leaves, in network order and by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploypipe.records import Block, ChannelGroup, PruningPlan, Structures

_MAX_PARTS = 8  # of a module that are shown; if it has more, neighbours are merged
_TO = " to "
_FEW = 12  # a stage of at most so many structures is not split further


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One group's width before and after, or a removed block that holds no group."""

    name: str
    num_units: int  # before; 0 for a block
    kept: int
    is_gone: bool  # removed with its block


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Neighbouring layers whose names start alike."""

    name: str
    layers: tuple[Layer, ...]
    num_blocks: int  # that can be removed
    num_removed_blocks: int

    @property
    def num_units(self) -> int:
        return sum(layer.num_units for layer in self.layers)

    @property
    def share_left(self) -> float | None:
        """The share of its units that is kept; None if no layer has units."""
        return sum(layer.kept for layer in self.layers) / self.num_units if self.num_units else None

    def short(self, layer: Layer) -> str:
        """The layer's name without the part that it shares with the stage."""
        first, _, last = self.name.partition(_TO)
        return layer.name.removeprefix(f"{first.rpartition('.')[0] if last else first}.")


def stages_of(structures: Structures, plan: PruningPlan) -> tuple[Stage, ...]:
    """List the width of every group after `plan`, stage by stage. A removed block without groups is a layer too."""
    found = _in_order(structures)
    parts = _split([item.name for item in found], len(found), depth=1) if found else {}
    kept = {cut.group: cut.num_units - len(cut.removed) for cut in plan.cuts}
    stages = []
    for name, members in parts.items():
        items = [item for item in found if item.name in members]
        blocks = [item.name for item in items if isinstance(item, Block)]
        layers = [_layer(item, plan, kept) for item in items if _is_shown(item, structures, plan)]
        removed = [block for block in blocks if block in plan.blocks]
        stages.append(Stage(name=name, layers=tuple(layers), num_blocks=len(blocks), num_removed_blocks=len(removed)))
    return tuple(stages)


def _in_order(structures: Structures) -> list[ChannelGroup | Block]:
    """Order structures as in the network: a block before its first group, one without groups after the block before."""
    found: list[ChannelGroup | Block] = list(structures.groups)
    at = 0
    for block in structures.blocks:
        inside = [number for number, item in enumerate(found) if _is_inside(item.name, (block.name,))]
        found.insert(inside[0] if inside else at, block)
        at = (inside[-1] if inside else at - 1) + 2
    return found


def _split(names: Sequence[str], total: int, depth: int) -> dict[str, set[str]]:
    """Sort names by their first parts. A part with most of the network is split once more."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_prefix(name, depth), []).append(name)
    if len(parts) > _MAX_PARTS:
        return _merge_neighbours(parts)
    stages: dict[str, set[str]] = {}
    for prefix, part in parts.items():
        is_most = len(part) > _FEW and 2 * len(part) > total
        if is_most and any(_prefix(name, depth + 1) != prefix for name in part):
            stages |= _split(part, total, depth + 1)
        else:
            stages[prefix] = set(part)
    return stages


def _merge_neighbours(parts: dict[str, list[str]]) -> dict[str, set[str]]:
    prefixes = list(parts)
    size = -(-2 * len(parts) // _MAX_PARTS)
    stages = {}
    for first in range(0, len(parts), size):
        some = prefixes[first : first + size]
        label = some[0] if len(some) == 1 else f"{some[0]}{_TO}{some[-1].rpartition('.')[2]}"
        stages[label] = {name for prefix in some for name in parts[prefix]}
    return stages


def _prefix(name: str, depth: int) -> str:
    return ".".join(name.partition(":")[0].split(".")[:depth])


def _is_shown(item: ChannelGroup | Block, structures: Structures, plan: PruningPlan) -> bool:
    if isinstance(item, ChannelGroup):
        return True
    return item.name in plan.blocks and not any(_is_inside(g.name, (item.name,)) for g in structures.groups)


def _layer(item: ChannelGroup | Block, plan: PruningPlan, kept: dict[str, int]) -> Layer:
    if isinstance(item, Block):
        return Layer(name=item.name, num_units=0, kept=0, is_gone=True)
    is_gone = all(_is_inside(member.module, plan.blocks) for member in item.members)
    width = 0 if is_gone else kept.get(item.name, item.num_units)
    return Layer(name=item.name, num_units=item.num_units, kept=width, is_gone=is_gone)


def _is_inside(name: str, blocks: Sequence[str]) -> bool:
    module = name.partition(":")[0]
    return any(module == block or module.startswith(f"{block}.") for block in blocks)
