"""Widths and blocks by a solver: the least summed loss under a cost bound."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from deploypipe.errors import DeploypipeError
from deploypipe.records import Curves, LossCurve, Structures

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
    A saving out of reach gives the largest there is.
    """
    options = _options(structures, curves, exponent, block_weight)
    benefit = np.array([o.saving for o in options])
    saving = min(saving, _largest_saving(options) * (1 - _GAP))
    constraints = [LinearConstraint(benefit[np.newaxis] / structures.num_macs, lb=saving / structures.num_macs)]
    constraints += _one_of_each(options)
    result = milp(
        np.array([o.loss for o in options]),
        integrality=np.ones(len(options), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": _TIME_LIMIT_S, "mip_rel_gap": _GAP},
    )
    if result.x is None:  # the saving is within reach: only the time limit can end here
        raise DeploypipeError(
            f"no allocation was found in {_TIME_LIMIT_S:g} s ({result.message}); lower search.num_levels"
        )
    chosen = [o for o, taken in zip(options, result.x, strict=True) if taken > 0.5]
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
    return max(0.0, 1 - _largest_saving(_options(structures, curves, 1.0, 1.0)) / structures.num_macs)


def uniform(structures: Structures, fraction: float, multiple: int) -> Allocation:
    """The same fraction of every group kept, in steps of `multiple` channels; no block removed."""
    widths = {}
    for group in structures.groups:
        step = group.step(multiple)
        widths[group.name] = min(max(step, round(group.num_units * fraction / step) * step), group.num_units)
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
    per_unit = {g.name: (g.num_units, g.macs_per_unit) for g in structures.groups}
    macs = {b.name: float(b.macs) for b in structures.blocks}
    droppable = [c.name for c in curves.curves if c.kind == "block"]
    options: list[_Option] = []
    for curve in curves.curves:
        if curve.kind == "block":
            loss = block_weight * curve.kl[0] ** exponent
            name = curve.name
            options.append(_Option(name=name, kind="block", kept=0, loss=loss, saving=macs[name], block=name))
            continue
        width, saved = per_unit[curve.name]
        home = next((b for b in droppable if curve.name.startswith(f"{b}.")), "")
        for kept, kl in zip(curve.kept, _rising(curve), strict=True):
            saving = (width - kept) * saved
            options.append(
                _Option(name=curve.name, kind="channels", kept=kept, loss=kl**exponent, saving=saving, block=home)
            )
    return options


def _rising(curve: LossCurve) -> list[float]:
    """The losses made monotone: keeping less never counts as better, whatever the noise says."""
    losses: list[float] = []
    for kl in reversed(curve.kl):
        losses.append(max(kl, losses[-1]) if losses else kl)
    return losses[::-1]


def _largest_saving(options: list[_Option]) -> float:
    groups: dict[str, float] = {}
    inside: dict[str, float] = {}
    for option in options:
        if option.kind == "channels":
            groups[option.name] = max(groups.get(option.name, 0.0), option.saving)
    homes = {o.name: o.block for o in options if o.kind == "channels"}
    for name, saving in groups.items():
        inside[homes[name]] = inside.get(homes[name], 0.0) + saving
    blocks = {o.name: o.saving for o in options if o.kind == "block"}
    return sum(max(blocks.get(home, 0.0), saving) for home, saving in inside.items()) + sum(
        saving for name, saving in blocks.items() if name not in inside
    )


def _one_of_each(options: list[_Option]) -> list[LinearConstraint]:
    """For each group: exactly one width, or its block is dropped."""
    names = sorted({o.name for o in options if o.kind == "channels"})
    rows, cols = [], []
    blocks = {o.name: i for i, o in enumerate(options) if o.kind == "block"}
    for row, name in enumerate(names):
        own = [i for i, o in enumerate(options) if o.kind == "channels" and o.name == name]
        home = options[own[0]].block
        own += [blocks[home]] if home else []
        rows += [row] * len(own)
        cols += own
    if not names:
        return []
    matrix = csr_array((np.ones(len(rows)), (rows, cols)), shape=(len(names), len(options)))
    return [LinearConstraint(matrix, lb=1, ub=1)]
