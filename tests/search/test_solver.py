"""The solver's choice equals the best one by enumeration."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploypipe.records import (
    Block,
    ChannelGroup,
    Curves,
    LossCurve,
    Member,
    ResolvedConstraints,
    ScoreTable,
    Structures,
)
from deploypipe.search.allocation.solver import (
    Allocation,
    Bound,
    Emphasis,
    allocate,
    allocate_to,
    allowed_widths,
    cheapest,
    cost_of,
    greedy,
    uniform,
)
from deploypipe.search.cost_models.additive_costs import STAYS, Costs, Pair, mac_costs

WIDTH = 4


def structures_of(macs: list[float], homes: list[int | None], blocks: list[float]) -> Structures:
    """Group i costs macs[i] a unit and lies in block homes[i] or outside; block i costs blocks[i] beside its groups."""
    names = [f"g{i}" if home is None else f"b{home}.g{i}" for i, home in enumerate(homes)]
    groups = tuple(
        ChannelGroup(name=name, num_units=WIDTH, members=(), params_per_unit=1.0, macs_per_unit=cost)
        for name, cost in zip(names, macs, strict=True)
    )
    inside = [sum(WIDTH * m for m, home in zip(macs, homes, strict=True) if home == i) for i in range(len(blocks))]
    costs = [int(own + more) for own, more in zip(blocks, inside, strict=True)]
    total = sum(costs) + int(sum(WIDTH * m for m, home in zip(macs, homes, strict=True) if home is None)) + 10
    rows = tuple(Block(name=f"b{i}", params=1, macs=cost) for i, cost in enumerate(costs))
    return Structures(model_fingerprint="", groups=groups, blocks=rows, frozen=(), num_params=1, num_macs=total)


def curves_of(structures: Structures, channel_kl: list[list[float]], block_kl: list[float]) -> Curves:
    curves = [
        LossCurve(name=g.name, kind="channels", kept=(1, 2, WIDTH), losses=(*kl, 0.0))
        for g, kl in zip(structures.groups, channel_kl, strict=True)
    ]
    curves += [
        LossCurve(name=b.name, kind="block", kept=(0,), losses=(kl,))
        for b, kl in zip(structures.blocks, block_kl, strict=True)
    ]
    return Curves(curves=tuple(curves), num_samples=1)


def cost_by_hand(choice: Allocation, structures: Structures, curves: Curves, exponent: float) -> tuple[float, float]:
    """Loss and saving of one allocation, each width's loss at least that of all wider ones."""
    loss = saving = 0.0
    table = {curve.name: curve for curve in curves.curves}
    for group in structures.groups:
        if group.name in choice.widths:
            kept = choice.widths[group.name]
            curve = table[group.name]
            loss += max(kl for k, kl in zip(curve.kept, curve.losses, strict=True) if k >= kept) ** exponent
            saving += (group.num_units - kept) * group.macs_per_unit
    for block in structures.blocks:
        if block.name in choice.blocks:
            loss += table[block.name].losses[0] ** exponent
            saving += block.macs
    return loss, saving


def is_allowed(choice: Allocation, structures: Structures) -> bool:
    asked = structures.constraints
    return (
        all(width >= asked.least.get(name, 1) for name, width in choice.widths.items())
        and all(len({choice.widths[n] for n in names if n in choice.widths}) < 2 for names in asked.uniform)
        and len(structures.blocks) - len(choice.blocks) >= asked.least_blocks
    )


def every_allocation(structures: Structures) -> list[Allocation]:
    found = []
    for dropped in product([False, True], repeat=len(structures.blocks)):
        gone = tuple(b.name for b, drop in zip(structures.blocks, dropped, strict=True) if drop)
        names = [g.name for g in structures.groups if g.name.partition(".")[0] not in gone]
        for widths in product([1, 2, WIDTH], repeat=len(names)):
            found.append(Allocation(widths=dict(zip(names, widths, strict=True)), blocks=gone))
    return [allocation for allocation in found if is_allowed(allocation, structures)]


LOSS = st.floats(0, 3)


@st.composite
def constraints(draw: st.DrawFn, structures: Structures) -> ResolvedConstraints:
    """Up to two classes of groups with one width, a least width for each class or group, and for the blocks."""
    marks = {group.name: draw(st.integers(0, 2)) for group in structures.groups}
    uniform = tuple(tuple(n for n, mark in marks.items() if mark == c) for c in (1, 2))
    uniform = tuple(names for names in uniform if len(names) > 1)
    alone = [(name,) for name in marks if not any(name in names for names in uniform)]
    least = {name: width for names in (*uniform, *alone) for width in [draw(st.integers(1, WIDTH))] for name in names}
    num_blocks = draw(st.integers(0, len(structures.blocks)))
    return ResolvedConstraints(least=least, uniform=uniform, least_blocks=num_blocks)


@st.composite
def problems(draw: st.DrawFn, homes: list[int | None] | None = None) -> tuple[Structures, Curves]:
    """homes: the block that each group lies in; of two blocks, where it is given."""
    num_blocks = draw(st.integers(0, 2)) if homes is None else 2
    homes = homes or draw(st.lists(st.sampled_from([None, *range(num_blocks)]), min_size=1, max_size=4))
    macs = draw(st.lists(st.integers(1, 50), min_size=len(homes), max_size=len(homes)))
    blocks = draw(st.lists(st.integers(1, 50), min_size=num_blocks, max_size=num_blocks))
    structures = structures_of([float(m) for m in macs], homes, [float(b) for b in blocks])
    structures = replace(structures, constraints=draw(st.just(ResolvedConstraints()) | constraints(structures)))
    channel_kl = draw(st.lists(st.lists(LOSS, min_size=2, max_size=2), min_size=len(homes), max_size=len(homes)))
    return structures, curves_of(structures, channel_kl, draw(st.lists(LOSS, min_size=num_blocks, max_size=num_blocks)))


def macs_bound(structures: Structures, curves: Curves, share: float) -> Bound:
    return Bound(costs=mac_costs(structures, allowed_widths(structures, curves)), share=share)


@given(problem=problems(), share=st.floats(0, 1.2), exponent=st.sampled_from([0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_equals_enumeration(problem: tuple[Structures, Curves], share: float, exponent: float) -> None:
    structures, curves = problem
    everything = [(cost_by_hand(a, structures, curves, exponent), a) for a in every_allocation(structures)]
    reach = max(saving for (_, saving), _ in everything)
    bound = macs_bound(structures, curves, 1 - share * reach / structures.num_macs)
    least = cost_of(cheapest(structures, curves, bound.costs), bound.costs)
    assert least == pytest.approx(1 - reach / structures.num_macs, abs=1e-4)
    chosen = allocate(structures, curves, [bound], Emphasis(exponent=exponent))
    loss, saving = cost_by_hand(chosen, structures, curves, exponent)
    assert cost_of(chosen, bound.costs) == pytest.approx(1 - saving / structures.num_macs)
    needed = min(share * reach, reach * (1 - 1e-4))
    assert saving >= needed - 1e-5 * structures.num_macs
    if share <= 1:
        best = min(loss for (loss, saved), _ in everything if saved >= needed)
        assert loss <= best * (1 + 2e-4) + 1e-5
    assert is_allowed(chosen, structures)
    for group in structures.groups:  # one width, or none because its block is gone
        assert (group.name in chosen.widths) != (group.name.partition(".")[0] in chosen.blocks)


@st.composite
def joint_costs(draw: st.DrawFn, structures: Structures) -> Costs:
    """Costs with one to three pairs: of two groups, or of a group and a block that it does not lie in."""
    levels = {g.name: sorted({k for k in (1, 2, WIDTH)}) for g in structures.groups}
    amounts = st.floats(-0.3, 0.3)
    homes = {g.name: g.name.partition(".")[0] for g in structures.groups}
    names = [*levels, *(b.name for b in structures.blocks)]
    possible = [(a, b) for i, a in enumerate(levels) for b in names[i + 1 :] if b not in (homes[a], a)]
    pairs = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=3, unique=True))
    return Costs(
        fixed=draw(amounts),
        widths={name: {k: draw(amounts) for k in kept} for name, kept in levels.items()},
        blocks={b.name: draw(amounts) for b in structures.blocks},
        pairs=tuple(
            Pair(first=a, second=b, cost={w: draw(amounts) for w in product(levels[a], levels.get(b, [STAYS]))})
            for a, b in pairs
        ),
    )


@given(data=st.data(), share=st.floats(-0.1, 0.6))
@settings(max_examples=50, deadline=None)
def test_joint_costs_of_two_choices_equal_enumeration(data: st.DataObject, share: float) -> None:
    structures, curves = data.draw(problems([None, 0, 0, 1]))
    costs = [data.draw(joint_costs(structures)) for _ in range(2)]
    everything = every_allocation(structures)
    ranges = [sorted(cost_of(a, c) for a in everything) for c in costs]
    bounds = [
        Bound(costs=c, share=seen[0] + share * (seen[-1] - seen[0])) for c, seen in zip(costs, ranges, strict=True)
    ]
    within = [a for a in everything if all(cost_of(a, b.costs) <= b.share + 1e-9 for b in bounds)]
    chosen = allocate(structures, curves, bounds)
    assert is_allowed(chosen, structures)
    if not within:  # the cheapest by the first
        assert cost_of(chosen, costs[0]) == pytest.approx(ranges[0][0], abs=1e-4)
        return
    best = min(cost_by_hand(a, structures, curves, 1.0)[0] for a in within)
    assert all(cost_of(chosen, b.costs) <= b.share + 1e-5 for b in bounds)
    assert cost_by_hand(chosen, structures, curves, 1.0)[0] <= best * (1 + 2e-4) + 1e-5


def test_emphasis_moves_the_losses() -> None:
    structures = structures_of([10.0], [0], [0.0])
    curves = curves_of(structures, [[1.0, 1.0]], [1.2])
    bounds = [macs_bound(structures, curves, 1 - 20 / structures.num_macs)]
    assert allocate(structures, curves, bounds, Emphasis(block_weight=0.5)).blocks == ("b0",)
    assert allocate(structures, curves, bounds, Emphasis(block_weight=2.0)).blocks == ()
    structures = structures_of([10.0, 10.0], [None, None], [])
    curves = curves_of(structures, [[1.0, 1.0], [1.0, 1.0]], [])
    bounds = [macs_bound(structures, curves, 1 - 20 / structures.num_macs)]
    assert allocate(structures, curves, bounds, Emphasis(late=1.0)).widths["g1"] == WIDTH
    assert allocate(structures, curves, bounds, Emphasis(late=-1.0)).widths["g0"] == WIDTH


def test_bounds_are_tightened_until_the_real_network_fits() -> None:
    structures = structures_of([10.0, 10.0], [None, None], [])
    curves = curves_of(structures, [[1.0, 0.5], [2.0, 0.3]], [])

    def count(allocation: Allocation) -> list[float]:  # only two thirds of what was promised
        return [1 - 2 / 3 * cost_by_hand(allocation, structures, curves, 1.0)[1] / structures.num_macs]

    allocation = allocate_to(structures, curves, [macs_bound(structures, curves, 0.85)], count)
    assert count(allocation)[0] <= 0.85 < count(allocate(structures, curves, [macs_bound(structures, curves, 0.85)]))[0]


def test_an_unreachable_bound_gives_the_network_that_exceeds_it_least() -> None:
    structures = structures_of([10.0, 10.0], [None, None], [])
    curves = curves_of(structures, [[1.0, 0.5], [2.0, 0.3]], [])
    sizes = []

    def count(allocation: Allocation) -> list[float]:
        sizes.append(0.6 + 0.01 * sum(allocation.widths.values()) if len(sizes) % 2 else 0.9)
        return [sizes[-1]]

    allocation = allocate_to(structures, curves, [macs_bound(structures, curves, 0.01)], count)
    assert 0.6 + 0.01 * sum(allocation.widths.values()) == min(sizes)


def test_uniform_keeps_the_same_fraction_in_steps() -> None:
    structures = structures_of([1.0, 1.0], [None, None], [])
    assert uniform(structures, 0.5, 1).widths == {"g0": 2, "g1": 2}
    assert uniform(structures, 0.1, 3).widths == {"g0": 3, "g1": 3}
    assert uniform(structures, 1.0, 8).widths == {"g0": 4, "g1": 4}
    bounded = replace(structures, constraints=ResolvedConstraints(least={"g1": 3}))
    assert uniform(bounded, 0.25, 1).widths == {"g0": 1, "g1": 3}
    assert uniform(bounded, 0.25, 2).widths == {"g0": 2, "g1": 4}


def test_a_group_partly_outside_a_block_keeps_a_width_without_it() -> None:
    """As tied groups do: what is left of them is cut."""
    structures = structures_of([10.0], [0], [500.0])
    members = tuple(Member(module=name, side="out", units=()) for name in ("b0.g0", "later"))
    structures = replace(structures, groups=(replace(structures.groups[0], members=members),))
    curves = curves_of(structures, [[1.0, 1.0]], [0.1])
    chosen = allocate(structures, curves, [macs_bound(structures, curves, 0.0)])
    assert chosen == Allocation(widths={"b0.g0": 1}, blocks=("b0",))


def test_greedy_keeps_units_that_are_large_within_their_group() -> None:
    structures = structures_of([1.0, 1.0], [None, None], [])
    sizes = ScoreTable(scorer="magnitude", channels={"g0": (1.0, 1.0, 1.0, 9.0), "g1": (50.0, 50.0, 50.0, 50.0)})
    assert greedy(structures, sizes, 5 / 8, 1).widths == {"g0": 1, "g1": 4}
    assert greedy(structures, sizes, 1.0, 1).widths == {"g0": 4, "g1": 4}
    assert greedy(structures, sizes, 0.0, 2).widths == {"g0": 2, "g1": 2}
