"""Two plans applied one after the other compose into one plan."""

import random
from functools import cache

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploypipe.errors import ModelError, PlanError
from deploypipe.pruning.modules.module_kinds import is_depthwise
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe
from deploypipe.pruning.surgery.plan import compose, empty_plan, make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import Edit, GroupCut, PruningPlan, ScoreTable, Structures


@cache
def prepared(name: str) -> tuple[nn.Module, Tensor, Structures]:
    dense, inputs = networks.build(name)
    return dense.eval(), inputs, list_structures(dense, inputs)


def random_plan(structures: Structures, seed: int) -> PruningPlan:
    rng = random.Random(seed)
    table = {g.name: tuple(rng.random() for _ in range(g.num_units)) for g in structures.groups}
    widths = {g.name: rng.randint(1, g.num_units) for g in structures.groups if rng.random() < 0.8}
    blocks = [b.name for b in structures.blocks if rng.random() < 0.2]
    return make_plan(structures, ScoreTable(scorer="random", channels=table), widths, blocks)


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """The sizes that modules keep in attributes."""
    plain = str | int | float | tuple
    return [{k: v for k, v in vars(module).items() if isinstance(v, plain)} for module in model.modules()]


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
@given(first=st.integers(0, 2**32), second=st.integers(0, 2**32))
@settings(max_examples=2, deadline=None)
def test_the_composed_plan_does_what_both_plans_do(name: str, first: int, second: int) -> None:
    dense, inputs, structures = prepared(name)
    plan = random_plan(structures, first)
    once = apply_plan(dense, plan)
    try:
        later = random_plan(list_structures(once, inputs), second)
    except ModelError:
        return  # nothing is left that could go
    composed = compose(plan, later, dense)
    twice, at_once = apply_plan(once, later), apply_plan(dense, composed)
    expected, seen = twice.state_dict(), at_once.state_dict()
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[key], seen[key]) for key in expected)
    assert attributes(twice) == attributes(at_once)
    with torch.no_grad():
        assert torch.equal(twice(inputs), at_once(inputs))
    describe(dense, at_once, composed, inputs)


def test_groups_are_counted_in_dense_units() -> None:
    dense, inputs = networks.build("mlp")
    structures = list_structures(dense, inputs)
    table = ScoreTable(scorer="order", channels={"0": tuple(map(float, range(12)))})
    first = make_plan(structures, table, {"0": 8})
    left = list_structures(apply_plan(dense, first), inputs)
    odd_ones_go = ScoreTable(scorer="odd", channels={"0": (1.0, 0.0) * 4, "2": tuple(map(float, range(8)))})
    second = make_plan(left, odd_ones_go, {"0": 4, "2": 6})
    plan = compose(first, second, dense)
    assert plan.cuts == (
        GroupCut(group="0", asked=4, removed=(0, 1, 2, 3, 5, 7, 9, 11), num_units=12),
        GroupCut(group="2", asked=6, removed=(0, 1), num_units=8),
    )
    assert Edit(module="2", side="in", removed=(0, 1, 2, 3, 5, 7, 9, 11)) in plan.edits


def test_a_grouped_convolution_that_became_depthwise_loses_whole_groups() -> None:
    dense, inputs = networks.build("resnext")
    names = ("layer1.0.conv1", "layer1.0.conv2")
    flat = ScoreTable(scorer="flat", channels={name: (0.0,) * 4 for name in names})
    first = make_plan(list_structures(dense, inputs), flat, dict.fromkeys(names, 1))
    once = apply_plan(dense, first)
    assert is_depthwise(once.layer1[0].conv2)
    last = ScoreTable(scorer="last", channels={names[0]: (0.0, 1.0)})
    second = make_plan(list_structures(once, inputs), last, {names[0]: 1})
    plan = compose(first, second, dense)
    assert Edit(module=names[1], side="in", removed=(0, 1, 2, 3, 5, 6, 7)) in plan.edits
    twice, at_once = apply_plan(once, second).eval(), apply_plan(dense, plan).eval()
    assert at_once.layer1[0].conv2.groups == twice.layer1[0].conv2.groups == 1
    assert torch.equal(twice(inputs), at_once(inputs))


def test_empty_plans_change_nothing() -> None:
    dense, inputs = networks.build("bottleneck")
    structures = list_structures(dense, inputs)
    plan, empty = random_plan(structures, 3), empty_plan(structures)
    after = empty_plan(list_structures(apply_plan(dense, plan), inputs))
    assert compose(empty, plan, dense) == plan == compose(plan, after, dense)


def test_a_plan_for_another_network_is_refused() -> None:
    dense, inputs = networks.build("mlp")
    structures = list_structures(dense, inputs)
    plan = make_plan(structures, ScoreTable(scorer="flat", channels={"0": (0.0,) * 12}), {"0": 6})
    with pytest.raises(PlanError, match=r"the second plan does not continue the first one: .* another structure"):
        compose(plan, plan, dense)
    with pytest.raises(PlanError, match=r"^the plan was made for .* other weights"):
        compose(plan, plan, networks.mlp())
