"""The solver finds what trying everything that is allowed finds."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploypipe.records import Block, ChannelGroup, Curves, LossCurve, Member, ResolvedConstraints, Structures
from deploypipe.search.allocate import Allocation, allocate, allocate_to, least_macs, uniform

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
        LossCurve(name=g.name, kind="channels", kept=(1, 2, WIDTH), kl=(*kl, 0.0))
        for g, kl in zip(structures.groups, channel_kl, strict=True)
    ]
    curves += [
        LossCurve(name=b.name, kind="block", kept=(0,), kl=(kl,))
        for b, kl in zip(structures.blocks, block_kl, strict=True)
    ]
    return Curves(curves=tuple(curves), num_samples=1)


def cost_of(choice: Allocation, structures: Structures, curves: Curves, exponent: float) -> tuple[float, float]:
    """Loss and saving of one allocation, each width's loss at least that of all wider ones."""
    loss = saving = 0.0
    table = {curve.name: curve for curve in curves.curves}
    for group in structures.groups:
        if group.name in choice.widths:
            kept = choice.widths[group.name]
            curve = table[group.name]
            loss += max(kl for k, kl in zip(curve.kept, curve.kl, strict=True) if k >= kept) ** exponent
            saving += (group.num_units - kept) * group.macs_per_unit
    for block in structures.blocks:
        if block.name in choice.blocks:
            loss += table[block.name].kl[0] ** exponent
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
def problems(draw: st.DrawFn) -> tuple[Structures, Curves]:
    num_blocks = draw(st.integers(0, 2))
    homes = draw(st.lists(st.sampled_from([None, *range(num_blocks)]), min_size=1, max_size=4))
    macs = draw(st.lists(st.integers(1, 50), min_size=len(homes), max_size=len(homes)))
    blocks = draw(st.lists(st.integers(1, 50), min_size=num_blocks, max_size=num_blocks))
    structures = structures_of([float(m) for m in macs], homes, [float(b) for b in blocks])
    structures = replace(structures, constraints=draw(st.just(ResolvedConstraints()) | constraints(structures)))
    channel_kl = draw(st.lists(st.lists(LOSS, min_size=2, max_size=2), min_size=len(homes), max_size=len(homes)))
    return structures, curves_of(structures, channel_kl, draw(st.lists(LOSS, min_size=num_blocks, max_size=num_blocks)))


@given(problem=problems(), share=st.floats(0, 1.2), exponent=st.sampled_from([0.5, 1.0]))
@settings(max_examples=150, deadline=None)
def test_equals_enumeration(problem: tuple[Structures, Curves], share: float, exponent: float) -> None:
    structures, curves = problem
    everything = [(cost_of(a, structures, curves, exponent), a) for a in every_allocation(structures)]
    reach = max(saving for (_, saving), _ in everything)
    assert least_macs(structures, curves) == pytest.approx(1 - reach / structures.num_macs)
    asked = share * reach
    chosen = allocate(structures, curves, asked, exponent=exponent)
    loss, saving = cost_of(chosen, structures, curves, exponent)
    needed = min(asked, reach * (1 - 1e-4))
    assert saving >= needed - 1e-6 * structures.num_macs
    best = min(loss for (loss, saved), _ in everything if saved >= needed)
    assert loss <= best * (1 + 2e-4) + 1e-5
    assert is_allowed(chosen, structures)
    for group in structures.groups:  # one width, or none because its block is gone
        assert (group.name in chosen.widths) != (group.name.partition(".")[0] in chosen.blocks)


def test_block_weight_makes_blocks_dearer() -> None:
    structures = structures_of([10.0], [0], [0.0])
    curves = curves_of(structures, [[1.0, 1.0]], [1.2])
    assert allocate(structures, curves, 20, block_weight=0.5).blocks == ("b0",)
    assert allocate(structures, curves, 20, block_weight=2.0).blocks == ()


def test_bound_is_moved_until_the_real_network_fits() -> None:
    structures = structures_of([10.0, 10.0], [None, None], [])
    curves = curves_of(structures, [[1.0, 0.5], [2.0, 0.3]], [])

    def count(allocation: Allocation) -> int:  # only two thirds of what was promised
        return round(structures.num_macs - 2 / 3 * cost_of(allocation, structures, curves, 1.0)[1])

    allocation = allocate_to(structures, curves, 0.85, count)
    assert count(allocation) <= 76.5 < count(allocate(structures, curves, 13.5))


def test_bound_out_of_reach_gives_the_smallest_network_found() -> None:
    structures = structures_of([10.0, 10.0], [None, None], [])
    curves = curves_of(structures, [[1.0, 0.5], [2.0, 0.3]], [])
    sizes = []

    def count(allocation: Allocation) -> int:
        sizes.append(60 + sum(allocation.widths.values()) if len(sizes) % 2 else 90)
        return sizes[-1]

    allocation = allocate_to(structures, curves, 0.01, count)
    assert 60 + sum(allocation.widths.values()) == min(sizes)


def test_uniform_keeps_the_same_fraction_in_steps() -> None:
    structures = structures_of([1.0, 1.0], [None, None], [])
    assert uniform(structures, 0.5, 1).widths == {"g0": 2, "g1": 2}
    assert uniform(structures, 0.1, 3).widths == {"g0": 3, "g1": 3}
    assert uniform(structures, 1.0, 8).widths == {"g0": 4, "g1": 4}
    bounded = replace(structures, constraints=ResolvedConstraints(least={"g1": 3}))
    assert uniform(bounded, 0.25, 1).widths == {"g0": 1, "g1": 3}
    assert uniform(bounded, 0.25, 2).widths == {"g0": 2, "g1": 4}


def test_a_group_that_reaches_out_of_a_block_has_a_width_without_it() -> None:
    """As tied groups do: what is left of them is cut."""
    structures = structures_of([10.0], [0], [500.0])
    members = tuple(Member(module=name, side="out", units=()) for name in ("b0.g0", "later"))
    structures = replace(structures, groups=(replace(structures.groups[0], members=members),))
    chosen = allocate(structures, curves_of(structures, [[1.0, 1.0]], [0.1]), structures.num_macs)
    assert chosen == Allocation(widths={"b0.g0": 1}, blocks=("b0",))
