"""A network's cost as a sum over its choices of widths and blocks, which the solver can bound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploypipe.records import ChannelGroup, Structures
from deploypipe.search.cost_models.latency_model import LatencyModel
from deploypipe.search.cost_models.width_dependencies import LayerWidths

_TINY = 1e-7  # of the dense network's cost: smaller joint costs of two widths are left out
STAYS = 1  # the "width" of a block that is not removed


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The joint cost of two groups, or of a group and a block, beyond what each costs alone."""

    first: str
    second: str
    cost: dict[tuple[int, int], float]  # by the widths of both


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Shares of the dense network's cost. A group that is removed with its block costs nothing."""

    fixed: float
    widths: dict[str, dict[int, float]]  # by group and width
    blocks: dict[str, float]  # of each block that stays, without what its groups cost
    pairs: tuple[Pair, ...] = ()


Levels = Mapping[str, Sequence[int]]  # by group: the widths to choose from, the dense one among them


def mac_costs(structures: Structures, levels: Levels) -> Costs:
    """Multiply-accumulates, one structure at a time.

    Exact for groups that share no layer with another group (all inside residual blocks), otherwise too low;
    `allocate_to` corrects for that.
    """
    total = structures.num_macs
    saved = {g.name: g.macs_per_unit / total for g in structures.groups}
    return _additive(structures, levels, saved, {b.name: b.macs / total for b in structures.blocks})


def param_costs(structures: Structures, levels: Levels) -> Costs:
    """Parameters, as `mac_costs`."""
    total = structures.num_params
    saved = {g.name: g.params_per_unit / total for g in structures.groups}
    return _additive(structures, levels, saved, {b.name: b.params / total for b in structures.blocks})


def _additive(structures: Structures, levels: Levels, saved: Mapping[str, float], blocks: dict[str, float]) -> Costs:
    widths = {
        g.name: {kept: -(g.num_units - kept) * saved[g.name] for kept in levels[g.name]} for g in structures.groups
    }
    return Costs(fixed=1 - sum(blocks.values()), widths=widths, blocks=blocks)


def latency_costs(model: LatencyModel, structures: Structures, levels: Levels) -> Costs:
    """Predicted latency.

    Exact for layers that one or two groups change, unless both lie outside a block that is removed. Other layers count
    one group at a time; `allocate_to` corrects for that.
    """
    groups = {g.name: g for g in structures.groups}
    homes = {b.name: b.name for b in structures.blocks} | home_blocks(structures)
    sum_ = _Sum(levels)
    for layer in model.layers:
        _add_layer(sum_, layer, groups, homes, model)
    return sum_.costs(model.fixed)


def home_blocks(structures: Structures) -> dict[str, str]:
    """By group: the block that contains all of it, or "". Coupled groups may lie in several blocks."""
    return {g.name: next((b.name for b in structures.blocks if lies_in(g, b.name)), "") for g in structures.groups}


def lies_in(group: ChannelGroup, block: str) -> bool:
    names = (group.name.partition(":")[0], *(member.module for member in group.members))
    return all(name == block or name.startswith(f"{block}.") for name in names)


class _Sum:
    """Adds up costs, layer by layer."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.fixed = 0.0
        self.widths = {name: dict.fromkeys(kept, 0.0) for name, kept in levels.items()}
        self.blocks: dict[str, float] = {}
        self.pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}

    def add(self, names: Sequence[str], cost: Callable[[Mapping[str, int]], float], block: str) -> None:
        """Add one layer. cost: a function of widths by group; groups that are not named keep their dense width."""
        base = cost({})
        alone = {name: {kept: cost({name: kept}) - base for kept in self.levels[name]} for name in names}
        if block:
            self.blocks[block] = self.blocks.get(block, 0.0) + base
        else:
            self.fixed += base
        for name, costs in alone.items():
            for kept, extra in costs.items():
                self.widths[name][kept] += extra
        if len(names) == 2:
            first, second = names
            table = self.pairs.setdefault((first, second), {})
            for a in self.levels[first]:
                for b in self.levels[second]:
                    extra = cost({first: a, second: b}) - base - alone[first][a] - alone[second][b]
                    table[a, b] = table.get((a, b), 0.0) + extra

    def add_lost(self, name: str, block: str, cost: Callable[[Mapping[str, int]], float]) -> None:
        """Let the cost that group `name`, outside of `block`, has in one of the block's layers go with the block."""
        table = self.pairs.setdefault((name, block), {})
        for kept in self.levels[name]:
            extra = cost({name: kept}) - cost({})
            self.widths[name][kept] -= extra
            table[kept, STAYS] = table.get((kept, STAYS), 0.0) + extra

    def costs(self, fixed: float) -> Costs:
        pairs = [Pair(first=a, second=b, cost=table) for (a, b), table in self.pairs.items()]
        strong = tuple(pair for pair in pairs if max(map(abs, pair.cost.values())) > _TINY)
        return Costs(fixed=fixed + self.fixed, widths=self.widths, blocks=self.blocks, pairs=strong)


def _add_layer(
    sum_: _Sum, layer: LayerWidths, groups: Mapping[str, ChannelGroup], homes: Mapping[str, str], model: LatencyModel
) -> None:
    names = [name for name in layer.groups if name in sum_.levels]
    block = layer.blocks[0] if layer.blocks else ""

    def cost(widths: Mapping[str, int]) -> float:
        removed = {name: groups[name].num_units - kept for name, kept in widths.items()}
        return model.time_of(layer, (layer.inputs.width(removed), layer.outputs.width(removed)))

    sum_.add(names, cost, block)
    outside = [name for name in names if homes[name] != block] if block else []
    for name in outside:
        sum_.add_lost(name, block, cost)
