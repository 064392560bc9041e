"""Widths and blocks by a solver: the least summed loss under a cost bound."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from deploypipe.errors import DeploypipeError
from deploypipe.records import ChannelGroup, Curves, LossCurve, Structures

_TIME_LIMIT_S = 10.0
_GAP = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    widths: dict[str, int]
    blocks: tuple[str, ...]


def allocate(
    structures: Structures, curves: Curves, saving: float, *, exponent: float = 1.0, block_weight: float = 1.0
) -> Allocation:
    """Choose one width for each group and the blocks to drop: minimise sum KL^exponent, save at least `saving` MACs.

    A multiple-choice knapsack (HiGHS). Savings are taken one structure at a time: exact for groups that meet no other
    group in a layer (all inside residual blocks), otherwise too high; `allocate_to` corrects for that. An exponent
    below 1 counts small losses more, because together they do more harm than their sum (measured; see the README).
    A saving out of reach gives the largest there is that `structures.constraints` allow.
    """
    options = _options(structures, curves, exponent, block_weight)
    saving = min(saving, _largest_saving(structures, options) * (1 - _GAP))
    shared = [(names, kept) for names in structures.constraints.uniform for kept in _widths_of(names, options)]
    num_variables = len(options) + len(shared)
    benefit = {i: o.saving / structures.num_macs for i, o in enumerate(options)}
    constraints = [
        _rows([benefit], num_variables, lb=saving / structures.num_macs),
        *_one_of_each(options, num_variables),
    ]
    constraints += _same_width(options, shared, num_variables)
    constraints.append(_rows([_blocks(options)], num_variables, ub=_num_droppable(structures)))
    result = milp(
        np.array([*(o.loss for o in options), *[0.0] * len(shared)]),
        integrality=np.ones(num_variables, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": _TIME_LIMIT_S, "mip_rel_gap": _GAP},
    )
    if result.x is None:  # the saving is within reach: only the time limit can end here
        raise DeploypipeError(
            f"no allocation was found in {_TIME_LIMIT_S:g} s ({result.message}); lower search.num_levels"
        )
    chosen = [o for o, taken in zip(options, result.x[: len(options)], strict=True) if taken > 0.5]
    return Allocation(
        widths={o.name: o.kept for o in chosen if o.kind == "channels"},
        blocks=tuple(o.name for o in chosen if o.kind == "block"),
    )


def allocate_to(
    structures: Structures,
    curves: Curves,
    macs_kept: float,
    count_macs: Callable[[Allocation], int],
    *,
    exponent: float = 1.0,
    block_weight: float = 1.0,
) -> Allocation:
    """`allocate` with the bound moved until the network that really comes out keeps at most `macs_kept` of the MACs.

    count_macs: the MACs of the pruned network. Ends within eight corrections, and then with the smallest network found:
    a bound out of reach is for the budget's check to refuse.
    """
    limit = macs_kept * structures.num_macs
    saving = structures.num_macs - limit
    found: list[tuple[float, Allocation]] = []
    for _ in range(8):
        allocation = allocate(structures, curves, saving, exponent=exponent, block_weight=block_weight)
        excess = count_macs(allocation) - limit
        if excess <= 0:
            return allocation
        found.append((excess, allocation))
        saving = max(saving + excess, _promised(structures, allocation) + _GAP * structures.num_macs)  # never the same
    return min(found, key=lambda pair: pair[0])[1]


def _promised(structures: Structures, allocation: Allocation) -> float:
    """What `allocate` counted as saved."""
    groups = {g.name: g for g in structures.groups}
    channels = sum((groups[n].num_units - kept) * groups[n].macs_per_unit for n, kept in allocation.widths.items())
    return channels + sum(block.macs for block in structures.blocks if block.name in allocation.blocks)


def least_macs(structures: Structures, curves: Curves) -> float:
    """The smallest share of the dense MACs that any choice of widths and blocks can reach (estimated)."""
    return max(0.0, 1 - _largest_saving(structures, _options(structures, curves, 1.0, 1.0)) / structures.num_macs)


def uniform(structures: Structures, fraction: float, multiple: int) -> Allocation:
    """The same fraction of every group kept, in steps of `multiple` channels, its least at least; no block removed."""
    widths = {}
    for group in structures.groups:
        step = group.step(multiple)
        least = structures.least_width(group, multiple)
        widths[group.name] = min(max(least, round(group.num_units * fraction / step) * step), group.num_units)
    return Allocation(widths=widths, blocks=())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Option:
    """One binary variable of the program."""

    name: str
    kind: str
    kept: int
    loss: float
    saving: float
    block: str  # the droppable block it lies in ("" outside)


def _options(structures: Structures, curves: Curves, exponent: float, block_weight: float) -> list[_Option]:
    groups = {g.name: g for g in structures.groups}
    macs = {b.name: float(b.macs) for b in structures.blocks}
    droppable = [c.name for c in curves.curves if c.kind == "block"]
    allowed = _allowed_widths(structures, curves)
    options: list[_Option] = []
    for curve in curves.curves:
        if curve.kind == "block":
            loss = block_weight * curve.kl[0] ** exponent
            name = curve.name
            options.append(_Option(name=name, kind="block", kept=0, loss=loss, saving=macs[name], block=name))
            continue
        group = groups[curve.name]
        home = next((b for b in droppable if _lies_in(group, b)), "")
        for kept, kl in zip(curve.kept, _rising(curve), strict=True):
            if kept not in allowed[curve.name]:
                continue
            saving = (group.num_units - kept) * group.macs_per_unit
            options.append(
                _Option(name=curve.name, kind="channels", kept=kept, loss=kl**exponent, saving=saving, block=home)
            )
    return options


def _allowed_widths(structures: Structures, curves: Curves) -> dict[str, set[int]]:
    """By group: the measured widths from its least on, and of groups with one width those that all of them have."""
    least = structures.constraints.least
    widths = {c.name: {k for k in c.kept if k >= least.get(c.name, 1)} for c in curves.curves if c.kind == "channels"}
    for names in structures.constraints.uniform:
        widths |= dict.fromkeys(names, set.intersection(*(widths[name] for name in names)))
    return widths


def _lies_in(group: ChannelGroup, block: str) -> bool:
    """Whether nothing of the group is left without the block; groups that are tied may lie in several blocks."""
    names = (group.name.partition(":")[0], *(member.module for member in group.members))
    return all(name == block or name.startswith(f"{block}.") for name in names)


def _rising(curve: LossCurve) -> list[float]:
    """The losses made monotone: keeping less never counts as better, whatever the noise says."""
    losses: list[float] = []
    for kl in reversed(curve.kl):
        losses.append(max(kl, losses[-1]) if losses else kl)
    return losses[::-1]


def _largest_saving(structures: Structures, options: list[_Option]) -> float:
    """Every group at its least width, but for the blocks that save more when they go, as many as may."""
    groups: dict[str, float] = {}
    inside: dict[str, float] = {}
    for option in options:
        if option.kind == "channels":
            groups[option.name] = max(groups.get(option.name, 0.0), option.saving)
    homes = {o.name: o.block for o in options if o.kind == "channels"}
    for name, saving in groups.items():
        inside[homes[name]] = inside.get(homes[name], 0.0) + saving
    more = sorted((o.saving - inside.get(o.name, 0.0) for o in options if o.kind == "block"), reverse=True)
    return sum(inside.values()) + sum(max(gain, 0.0) for gain in more[: _num_droppable(structures)])


def _num_droppable(structures: Structures) -> int:
    return len(structures.blocks) - structures.constraints.least_blocks


def _blocks(options: list[_Option]) -> dict[int, float]:
    return {i: 1.0 for i, o in enumerate(options) if o.kind == "block"}


def _widths_of(names: Collection[str], options: list[_Option]) -> list[int]:
    return sorted({o.kept for o in options if o.name in names and o.kind == "channels"})


def _one_of_each(options: list[_Option], num_variables: int) -> list[LinearConstraint]:
    """For each group: exactly one width, or its block is dropped."""
    rows: dict[str, dict[int, float]] = {}
    blocks = {o.name: i for i, o in enumerate(options) if o.kind == "block"}
    for i, option in enumerate(options):
        if option.kind == "channels":
            row = rows.setdefault(option.name, {blocks[option.block]: 1.0} if option.block else {})
            row[i] = 1.0
    return [_rows(list(rows.values()), num_variables, lb=1, ub=1)] if rows else []


def _same_width(
    options: list[_Option], shared: Sequence[tuple[tuple[str, ...], int]], num_variables: int
) -> list[LinearConstraint]:
    """For each class of groups: exactly one width, the only one that any of them may take.

    shared: (class, width) for each variable that follows those of the options.
    """
    if not shared:
        return []
    column = {(name, kept): len(options) + i for i, (names, kept) in enumerate(shared) for name in names}
    classes: dict[tuple[str, ...], dict[int, float]] = {}
    for i, (names, _) in enumerate(shared):
        classes.setdefault(names, {})[len(options) + i] = 1.0
    bound = [{i: 1.0, column[o.name, o.kept]: -1.0} for i, o in enumerate(options) if (o.name, o.kept) in column]
    one_each = _rows(list(classes.values()), num_variables, lb=1, ub=1)
    return [one_each, _rows(bound, num_variables, ub=0)]


def _rows(
    rows: Sequence[Mapping[int, float]], num_variables: int, *, lb: float = -np.inf, ub: float = np.inf
) -> LinearConstraint:
    """rows: coefficient by variable."""
    values = [value for row in rows for value in row.values()]
    at = ([i for i, row in enumerate(rows) for _ in row], [column for row in rows for column in row])
    return LinearConstraint(csr_array((values, at), shape=(len(rows), num_variables)), lb=lb, ub=ub)
