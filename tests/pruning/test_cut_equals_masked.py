"""Invariants of every network and plan: cutting equals masking, and nothing else changes."""

import importlib.util
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploypipe.files.json_records import from_json, to_json
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe, masked_dense
from deploypipe.pruning.surgery.plan import empty_plan, make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import PruningPlan, ScoreTable, Structures

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).parents[1] / "networks.py")
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

OUTPUT = "its channels are the network's output"
EVERY = pytest.mark.parametrize("name", sorted(networks.NETWORKS))


@cache
def prepared(name: str) -> tuple[nn.Module, Tensor, Structures]:
    model, inputs = networks.build(name)
    return model, inputs, list_structures(model, inputs)


def random_plan(structures: Structures, seed: int) -> PruningPlan:
    rng = random.Random(seed)
    scores = {g.name: tuple(rng.random() for _ in range(g.num_units)) for g in structures.groups}
    widths = {g.name: rng.randint(1, g.num_units) for g in structures.groups if rng.random() < 0.8}
    blocks = [b.name for b in structures.blocks if rng.random() < 0.3]
    table = ScoreTable(scorer="random", channels=scores)
    return make_plan(structures, table, widths, blocks, channel_multiple=rng.choice([1, 1, 4]))


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


@EVERY
@given(seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_pruned_equals_masked_dense(name: str, seed: int) -> None:
    model, inputs, structures = prepared(name)
    plan = random_plan(structures, seed)
    expected = run(masked_dense(model, plan), inputs)
    torch.testing.assert_close(run(apply_plan(model, plan), inputs), expected, atol=1e-5, rtol=1e-4)


@EVERY
def test_the_dense_network_is_unchanged(name: str) -> None:
    model, inputs = networks.build(name)
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    structures = list_structures(model, inputs)
    pruned = apply_plan(model, random_plan(structures, 1))
    count_macs(model, inputs)
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not {p.data_ptr() for p in pruned.parameters()} & {p.data_ptr() for p in model.parameters()}


@EVERY
def test_a_plan_loaded_from_text_gives_identical_bits(name: str) -> None:
    model, _, structures = prepared(name)
    plan = random_plan(structures, 2)
    again = from_json(PruningPlan, to_json(plan), "plan.json")
    assert again == plan
    fresh, _ = networks.build(name)
    first, second = apply_plan(model, plan).state_dict(), apply_plan(fresh, again).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@EVERY
def test_removing_one_unit_saves_the_reported_cost(name: str) -> None:
    model, inputs, structures = prepared(name)
    for group in structures.groups:
        scores = ScoreTable(scorer="flat", channels={group.name: (0.0,) * group.num_units})
        plan = make_plan(structures, scores, {group.name: group.num_units - 1})
        params, macs = count_macs(apply_plan(model, plan), inputs)
        assert structures.num_params - params == pytest.approx(group.params_per_unit, rel=1e-6)
        assert structures.num_macs - macs == pytest.approx(group.macs_per_unit, rel=1e-6)


@EVERY
def test_removing_a_block_saves_the_reported_cost(name: str) -> None:
    model, inputs, structures = prepared(name)
    for block in structures.blocks:
        plan = make_plan(structures, ScoreTable(scorer="none", channels={}), {}, [block.name])
        pruned = apply_plan(model, plan)
        assert count_macs(pruned, inputs) == (structures.num_params - block.params, structures.num_macs - block.macs)
        assert isinstance(pruned.get_submodule(block.name), nn.Identity)


@EVERY
def test_pruned_network_trains_and_exports(name: str) -> None:
    model, inputs, structures = prepared(name)
    pruned = apply_plan(model, random_plan(structures, 3)).train()
    pruned(inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    program = torch.export.export(pruned.eval(), (inputs,)).module()
    torch.testing.assert_close(program(inputs), run(pruned, inputs), atol=1e-5, rtol=1e-4)


@EVERY
def test_every_layer_is_accounted_for(name: str) -> None:
    model, _, structures = prepared(name)
    frozen = {row.name for row in structures.frozen}
    offered = {member.module for group in structures.groups for member in group.members if member.side == "out"}
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding
    layers = {layer for layer, module in model.named_modules() if isinstance(module, kinds)}
    assert layers - frozen - offered == set()
    assert [row.reason for row in structures.frozen if row.name in layers] == [OUTPUT]  # all others can lose channels
    assert all(row.reason for row in structures.frozen)


@EVERY
def test_empty_plan_changes_nothing(name: str) -> None:
    model, inputs, structures = prepared(name)
    plan = empty_plan(structures)
    assert model_fingerprint(apply_plan(model, plan)) == structures.model_fingerprint
    report = describe(model, apply_plan(model, plan), plan, inputs)
    assert (report.rows, report.params_after, report.macs_after) == ((), structures.num_params, structures.num_macs)
