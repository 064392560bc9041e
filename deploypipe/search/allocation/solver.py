"""Choose widths and blocks with a solver: the smallest sum of losses within bounds of cost."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from deploypipe.errors import DeploypipeError
from deploypipe.records import Curves, LossCurve, ScoreTable, Structures
from deploypipe.search.cost_models.additive_costs import STAYS, Costs, home_blocks

_GAP = 1e-4
_MAX_NODES = 2000  # of the branch and bound: unlike a time limit, the same on every run
_NUM_CORRECTIONS = 8
_FAMILY_STEPS = 64  # shares of kept units that are tried
_NOTHING = -1e9  # no choice costs so little
_OUT_OF_REACH = 2  # of scipy's milp: no choice meets the bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """A choice of widths, and of the blocks to remove."""

    widths: dict[str, int]
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The highest cost of a choice, as a share of the dense network's cost."""

    costs: Costs
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Emphasis:
    """How the solver weighs measured losses."""

    exponent: float = 1.0  # below 1 small losses count more: together they do more harm than their sum (README)
    block_weight: float = 1.0  # factor of the losses of blocks
    by_importance: bool = False  # which blocks lose most: by `Curves.block_importance` instead of by the losses
    late: float = 0.0  # above 0 late structures' losses count more: by e^late at the end, e^-late at the front


def allocate(
    structures: Structures, curves: Curves, bounds: Sequence[Bound], emphasis: Emphasis | None = None
) -> Allocation:
    """Choose one width for each group and the blocks to remove: minimise the summed losses within all bounds.

    A mixed integer program (HiGHS). Each width of a group and each block has a binary variable. The joint cost of two
    choices takes their product, a binary variable too (Adams and Sherali 1986, linearised by sums over both). If no
    choice meets the bounds, the result is the cheapest one by the first bound that `structures.constraints` allow.
    """
    program = _Program(structures, curves, emphasis or Emphasis(), [bound.costs for bound in bounds])
    limits = [(row, bound.share) for row, bound in zip(program.costs, bounds, strict=True)]
    chosen = program.solve(program.losses, limits)
    if chosen is None and limits:
        chosen = program.solve(limits[0][0].row, [])
    if chosen is None:
        raise DeploypipeError(f"the solver found no allocation within {_MAX_NODES} nodes; lower search.num_levels")
    return chosen


def allocate_to(
    structures: Structures,
    curves: Curves,
    bounds: Sequence[Bound],
    count: Callable[[Allocation], Sequence[float]],
    emphasis: Emphasis | None = None,
) -> Allocation:
    """Call `allocate` with tighter and tighter bounds, until the network's real costs are within the given ones.

    count: the network's real costs, in the order of `bounds` and as shares of the dense network's. After at most eight
    corrections the result is the network that exceeds its bounds least: the budget's check refuses a bound that cannot
    be reached.
    """
    tightened = [bound.share for bound in bounds]
    found: list[tuple[float, Allocation]] = []
    for _ in range(_NUM_CORRECTIONS):
        moved = [Bound(costs=b.costs, share=share) for b, share in zip(bounds, tightened, strict=True)]
        allocation = allocate(structures, curves, moved, emphasis)
        excess = [cost - bound.share for cost, bound in zip(count(allocation), bounds, strict=True)]
        if max(excess, default=0.0) <= 0:
            return allocation
        found.append((max(excess), allocation))
        promised = [cost_of(allocation, bound.costs) for bound in bounds]  # the next choice has to promise less
        tightened = [
            min(share - over, was - _GAP) if over > 0 else share
            for share, over, was in zip(tightened, excess, promised, strict=True)
        ]
    return min(found, key=lambda pair: pair[0])[1]


def cost_of(allocation: Allocation, costs: Costs) -> float:
    """The cost as `allocate` counts it."""
    states = {**allocation.widths, **{name: STAYS for name in costs.blocks if name not in allocation.blocks}}
    total = costs.fixed + sum(costs.widths[name][kept] for name, kept in allocation.widths.items())
    total += sum(cost for name, cost in costs.blocks.items() if name in states)
    pairs = [pair for pair in costs.pairs if pair.first in states and pair.second in states]
    return total + sum(pair.cost[states[pair.first], states[pair.second]] for pair in pairs)


def cheapest(structures: Structures, curves: Curves, costs: Costs) -> Allocation:
    """The choice that costs least."""
    return allocate(structures, curves, [Bound(costs=costs, share=_NOTHING)])


def uniform(structures: Structures, fraction: float, multiple: int) -> Allocation:
    """Keep the same fraction of every group, in steps of `multiple` channels and at least its least width; all blocks
    stay."""
    kept = {group.name: group.num_units * fraction for group in structures.groups}
    return Allocation(widths=_in_steps(structures, kept, multiple), blocks=())


def greedy(structures: Structures, magnitudes: ScoreTable, fraction: float, multiple: int) -> Allocation:
    """Keep the given fraction of all units: those of largest magnitude relative to their group's mean. Widths as in
    `uniform`."""
    relative = {
        name: np.array(sizes) / max(float(np.mean(sizes)), 1e-30) for name, sizes in magnitudes.channels.items()
    }
    ranked = np.sort(np.concatenate(list(relative.values())))[::-1]
    threshold = ranked[min(round(fraction * len(ranked)), len(ranked) - 1)] if fraction < 1 else -np.inf
    kept = {name: float((own > threshold).sum()) for name, own in relative.items()}
    return Allocation(widths=_in_steps(structures, kept, multiple), blocks=())


def widest_within(choose: Callable[[float], Allocation], is_within: Callable[[Allocation], bool]) -> Allocation:
    """Of a family of networks, by the share that is kept, the widest within the bounds; the narrowest where none is."""
    low, high = 0, _FAMILY_STEPS
    while low < high:  # share low / 64 is within, or unknown for 0
        middle = (low + high + 1) // 2
        if is_within(choose(middle / _FAMILY_STEPS)):
            low = middle
        else:
            high = middle - 1
    return choose(low / _FAMILY_STEPS)


def _in_steps(structures: Structures, kept: Mapping[str, float], multiple: int) -> dict[str, int]:
    widths = {}
    for group in structures.groups:
        step, least = group.step(multiple), structures.least_width(group, multiple)
        widths[group.name] = min(max(least, round(kept[group.name] / step) * step), group.num_units)
    for names in structures.constraints.uniform:
        widths |= dict.fromkeys(names, max(widths[name] for name in names))
    return widths


def allowed_widths(structures: Structures, curves: Curves) -> dict[str, tuple[int, ...]]:
    """By group: the measured widths from its least on. Groups that share a width get those that all of them have."""
    least = structures.constraints.least
    widths = {c.name: {k for k in c.kept if k >= least.get(c.name, 1)} for c in curves.curves if c.kind == "channels"}
    for names in structures.constraints.uniform:
        widths |= dict.fromkeys(names, set.intersection(*(widths[name] for name in names)))
    return {name: tuple(sorted(kept)) for name, kept in widths.items()}


Row = dict[int, float]  # coefficient by variable
Rows = tuple[list[Row], float, float]  # rows, and the bounds (low, high) of each


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear function of the variables."""

    row: Row
    constant: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Option:
    """One binary variable: a group at a width, or a block that is removed."""

    name: str
    kept: int  # 0: a removed block
    loss: float


class _Program:
    """The variables in order: options, widths that groups share, products of two choices."""

    def __init__(self, structures: Structures, curves: Curves, emphasis: Emphasis, costs: Sequence[Costs]) -> None:
        self.options = _options(structures, curves, emphasis)
        self.column = {(o.name, o.kept): i for i, o in enumerate(self.options)}
        self.blocks = {o.name: i for i, o in enumerate(self.options) if o.kept == 0}
        self.homes = {n: b if b in self.blocks else "" for n, b in home_blocks(structures).items()}
        self.widths: dict[str, list[int]] = {}
        for option in self.options:
            if option.kept:
                self.widths.setdefault(option.name, []).append(option.kept)
        self.size = len(self.options)
        self.constraints = [*self._one_of_each(), *self._same_widths(structures.constraints.uniform)]
        num_droppable = len(structures.blocks) - structures.constraints.least_blocks
        self.constraints.append(([dict.fromkeys(self.blocks.values(), 1.0)], -np.inf, float(num_droppable)))
        self.num_binary = self.size
        self.costs = [self._cost(cost) for cost in costs]
        self.losses = {i: o.loss for i, o in enumerate(self.options)}

    def solve(self, objective: Row, limits: Sequence[tuple[Linear, float]]) -> Allocation | None:
        """Minimise the objective; None if no choice meets the limits. Each limit is a cost and its upper bound."""
        weights = np.zeros(self.size)
        weights[list(objective)] = list(objective.values())
        bounded = [([cost.row], -np.inf, most - cost.constant) for cost, most in limits]
        with _silent_solver():
            result = milp(
                weights,
                integrality=np.array([1] * self.num_binary + [0] * (self.size - self.num_binary)),
                bounds=Bounds(0, 1),
                constraints=[_constraint(*rows, self.size) for rows in (*self.constraints, *bounded) if rows[0]],
                options={"node_limit": _MAX_NODES, "mip_rel_gap": _GAP},
            )
        if result.status == _OUT_OF_REACH or result.x is None:
            return None
        chosen = [o for o, taken in zip(self.options, result.x[: len(self.options)], strict=True) if taken > 0.5]
        return Allocation(
            widths={o.name: o.kept for o in chosen if o.kept}, blocks=tuple(o.name for o in chosen if not o.kept)
        )

    def _one_of_each(self) -> list[Rows]:
        """For each group: exactly one width, or its block is removed."""
        rows: list[Row] = []
        for name, widths in self.widths.items():
            rows.append({self.column[name, kept]: 1.0 for kept in widths} | self._gone(self.homes[name]))
        return [(rows, 1.0, 1.0)]

    def _gone(self, block: str) -> Row:
        return {self.blocks[block]: 1.0} if block else {}

    def _same_widths(self, classes: Sequence[tuple[str, ...]]) -> list[Rows]:
        """For each class of groups: exactly one width, which all of them take."""
        one_each: list[Row] = []
        only: list[Row] = []
        for names in classes:
            shared = {k: self._new() for k in sorted({k for name in names for k in self.widths.get(name, [])})}
            one_each.append(dict.fromkeys(shared.values(), 1.0))
            only += [
                {self.column[n, k]: 1.0, column: -1.0}
                for n in names
                for k, column in shared.items()
                if (n, k) in self.column
            ]
        return [(one_each, 1.0, 1.0), (only, -np.inf, 0.0)]

    def _new(self) -> int:
        self.size += 1
        return self.size - 1

    def _cost(self, costs: Costs) -> Linear:
        """The cost as a linear function of the variables. Blocks without a variable stay."""
        row: Row = {}
        for name, by_width in costs.widths.items():
            for kept in self.widths.get(name, []):
                row[self.column[name, kept]] = by_width[kept]
        for name, column in self.blocks.items():
            row[column] = row.get(column, 0.0) - costs.blocks.get(name, 0.0)
        for pair in costs.pairs:
            if pair.second in self.widths:
                row |= self._products(pair.first, pair.second, pair.cost)
            elif pair.second in self.blocks:
                row |= self._products_with_block(pair.first, pair.second, pair.cost)
            else:
                for kept in self.widths[pair.first]:
                    row[self.column[pair.first, kept]] += pair.cost[kept, STAYS]
        return Linear(row=row, constant=costs.fixed + sum(costs.blocks.values()))

    def _products(self, first: str, second: str, cost: Mapping[tuple[int, int], float]) -> Row:
        """Add one variable for each pair of widths, 1 if both are chosen.

        For each width of one group, they sum to that width's variable, unless the other group is removed with a block
        of its own.
        """
        made = {(a, b): self._new() for a in self.widths[first] for b in self.widths[second]}
        gone = self._gone(self.homes[first]) | self._gone(self.homes[second])
        self.constraints.append(([dict.fromkeys(made.values(), 1.0) | gone], 1.0, np.inf))
        for name, position, other in ((first, 0, second), (second, 1, first)):
            sums: list[Row] = []
            for kept in self.widths[name]:
                members = [column for widths, column in made.items() if widths[position] == kept]
                sums.append(dict.fromkeys(members, 1.0) | {self.column[name, kept]: -1.0})
            always = self.homes[other] in ("", self.homes[name])
            self.constraints.append((sums, 0.0 if always else -np.inf, 0.0))
        return {column: cost[widths] for widths, column in made.items()}

    def _products_with_block(self, group: str, block: str, cost: Mapping[tuple[int, int], float]) -> Row:
        """As `_products`: 1 if the width is chosen and the block stays."""
        made = {kept: self._new() for kept in self.widths[group]}
        each: list[Row] = [{column: 1.0, self.column[group, kept]: -1.0} for kept, column in made.items()]
        total = dict.fromkeys(made.values(), 1.0) | self._gone(block)
        self.constraints.append((each, -np.inf, 0.0))
        self.constraints.append(([total], -np.inf, 1.0))
        self.constraints.append(([total | self._gone(self.homes[group])], 1.0, np.inf))
        return {column: cost[kept, STAYS] for kept, column in made.items()}


def _options(structures: Structures, curves: Curves, emphasis: Emphasis) -> list[_Option]:
    allowed = allowed_widths(structures, curves)
    blocks = [curve for curve in curves.curves if curve.kind == "block"]
    groups = [curve for curve in curves.curves if curve.kind == "channels"]
    if emphasis.by_importance:
        blocks = _reordered(blocks, curves.block_importance)
    options: list[_Option] = []
    for kind, alike in (("channels", groups), ("block", blocks)):
        for number, curve in enumerate(alike):
            place = 2 * number / max(len(alike) - 1, 1) - 1  # -1: the network's front
            weight = float(np.exp(emphasis.late * place)) * (emphasis.block_weight if kind == "block" else 1.0)
            losses = zip(curve.kept, _rising(curve), strict=True)
            options += [
                _Option(name=curve.name, kept=kept, loss=weight * kl**emphasis.exponent)
                for kept, kl in losses
                if kind == "block" or kept in allowed[curve.name]
            ]
    return options


def _reordered(blocks: Sequence[LossCurve], importance: Mapping[str, float]) -> list[LossCurve]:
    """Give the smallest loss to the least important block, and so on."""
    ranked = sorted(blocks, key=lambda block: importance[block.name])
    ascending = sorted(block.losses for block in blocks)
    losses = {block.name: loss for block, loss in zip(ranked, ascending, strict=True)}
    return [replace(block, losses=losses[block.name]) for block in blocks]


def _rising(curve: LossCurve) -> list[float]:
    """Make the losses monotone: because of noise, keeping less may look better, which must not count."""
    rising: list[float] = []
    for loss in reversed(curve.losses):
        rising.append(max(loss, rising[-1]) if rising else loss)
    return rising[::-1]


@contextmanager
def _silent_solver() -> Iterator[None]:
    """Silence HiGHS, which writes some notes to file descriptor 1 whatever its settings, past Python's own stream."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _constraint(rows: Sequence[Row], lb: float, ub: float, size: int) -> LinearConstraint:
    values = [value for row in rows for value in row.values()]
    at = ([i for i, row in enumerate(rows) for _ in row], [column for row in rows for column in row])
    return LinearConstraint(csr_array((values, at), shape=(len(rows), size)), lb=lb, ub=ub)
