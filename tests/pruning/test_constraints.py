"""Constraints of a recipe on widths and blocks hold in every plan, or are errors with names."""

from dataclasses import replace

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploypipe.errors import ConfigError, PlanError
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Constraints, Observe
from deploypipe.records import ChannelGroup, Member, ResolvedConstraints, ScoreTable, Structures
from deploypipe.scoring import SCORERS, score

ENCODER_HEADS = "layers.*.self_attn:heads"


def structures_of(network: str, **constraints: object) -> Structures:
    return list_structures(*networks.build(network), constraints=Constraints(**constraints))  # type: ignore[arg-type]


def flat_scores(structures: Structures) -> ScoreTable:
    """The higher index stays."""
    return ScoreTable(scorer="flat", channels={g.name: tuple(range(g.num_units)) for g in structures.groups})


def test_patterns_resolve_to_group_names() -> None:
    structures = structures_of(
        "pad_resnet",
        least={"stages.0.*": 0.3, "stages.0.1.conv1": 5, "stages.2.*": 1.0, "conv1": 1, "fc": 3},
        uniform=("stages.0.*", "stages.2.*", "stages.2.1.*"),
        least_blocks=2,
    )
    assert structures.constraints == ResolvedConstraints(
        least={
            "stages.0.0.conv1": 5,
            "stages.0.1.conv1": 5,
            "stages.2.0.conv1": 32,
            "stages.2.1.conv1": 32,
            "conv1": 1,
        },
        uniform=(("stages.0.0.conv1", "stages.0.1.conv1"), ("stages.2.0.conv1", "stages.2.1.conv1")),
        least_blocks=2,
    )
    assert structures_of("pad_resnet").constraints == ResolvedConstraints()


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (
            {"least": {"stages.9.*": 2}},
            r"least: 'stages\.9\.\*' matches no channel group; the nearest names are: stages",
        ),
        ({"least": {"stages.*": 10}}, r"least: 'stages\.\*' asks for 10 units of 'stages\.0\.0\.conv1', which has 8"),
        ({"uniform": ("stage",)}, r"uniform: 'stage' matches no channel group; the nearest names are: stages"),
        (
            {"uniform": ("stages.*",)},
            r"'stages\.\*' matches groups .* not alike \(stages\.0\.0\.conv1: 8 channels, .* 32",
        ),
        ({"uniform": ("fc",)}, r"'fc' matches 'fc', which cannot be removed \(its channels are the network's output\)"),
        ({"tied": (("conv1", "no"),)}, r"tied: 'no' matches no channel group"),
        ({"tied": (("conv1",),)}, r"tied: \(conv1\) names only conv1; name two or more"),
        ({"tied": (("conv1", "stages.1.0.conv1"),)}, r"tied: 'conv1, stages\.1\.0\.conv1' matches groups .* not alike"),
        ({"tied": (("conv1", "fc"),)}, r"tied: 'fc' matches 'fc', which cannot be removed"),
        ({"least_blocks": 5}, r"least_blocks: 5 blocks must stay, but only 4 can be removed at all; write 4 or less"),
    ],
)
def test_impossible_constraints_are_clear_errors(constraints: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        structures_of("pad_resnet", **constraints)


def test_heads_and_channels_cannot_be_tied() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn:heads: 2 heads"):
        structures_of("encoder", uniform=("layers.0.*",))


def test_keep_without_a_match_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe: keep: 'conv2' matches no module; the nearest names are: conv1"):
        list_structures(*networks.build("pad_resnet"), keep=["conv2"])


@given(
    dense=st.integers(1, 40),
    multiple=st.sampled_from([1, 4, 8]),
    least=st.integers(1, 40),
    asked=st.integers(1, 45),
)
@settings(max_examples=200, deadline=None)
def test_the_minimum_width_holds_after_rounding_and_is_the_reason(
    dense: int, multiple: int, least: int, asked: int
) -> None:
    least = min(least, dense)
    member = Member(module="conv", side="out", units=tuple((i,) for i in range(dense)))
    group = ChannelGroup(name="conv", num_units=dense, members=(member,), params_per_unit=1.0, macs_per_unit=1.0)
    free = Structures(model_fingerprint="", groups=(group,), blocks=(), frozen=(), num_params=1, num_macs=1)
    bound = replace(free, constraints=ResolvedConstraints(least={"conv": least}))

    def width(structures: Structures) -> tuple[int, str]:
        cuts = make_plan(structures, flat_scores(structures), {"conv": asked}, channel_multiple=multiple).cuts
        return (dense - len(cuts[0].removed), cuts[0].reason) if cuts else (dense, "")

    kept, reason = width(bound)
    assert kept >= least and (kept % multiple == 0 or kept == dense)
    if width(free)[0] >= least:
        assert kept == max(width(free)[0], min(-(-least // multiple) * multiple, dense))
    else:
        assert "recipe.constraints" in reason


def test_plans_that_break_a_constraint_are_refused() -> None:
    structures = structures_of("pad_resnet", uniform=("stages.0.*",), least_blocks=3)
    scores = flat_scores(structures)
    with pytest.raises(PlanError, match=r"one width, but there are several \(stages\.0\.0\.conv1: 4, .*conv1: 8\)"):
        make_plan(structures, scores, {"stages.0.0.conv1": 4})
    with pytest.raises(PlanError, match="2 of 4 removable blocks would stay"):
        make_plan(structures, scores, {}, ["stages.0.0", "stages.1.1"])
    plan = make_plan(structures, scores, {"stages.0.0.conv1": 4}, ["stages.0.1"])  # the other one is gone
    assert len(plan.cuts) == 1


@pytest.mark.parametrize(
    ("network", "tie"),
    [
        ("pad_resnet", ("conv1", "stages.0.*")),
        ("bottleneck", ("layer1.*.conv1", "layer1.*.conv2")),
        ("resnext", ("layer2.0.conv1", "layer2.1.conv1")),
        ("dense", ("layers.*",)),
        ("encoder", (ENCODER_HEADS,)),
        ("encoder", ("layers.*.linear1",)),
    ],
)
def test_tied_groups_lose_the_same_units_and_pruned_equals_masked(network: str, tie: tuple[str, ...]) -> None:
    model, inputs = networks.build(network)
    alone = list_structures(model, inputs)
    structures = list_structures(model, inputs, constraints=Constraints(tied=(tie,)))
    by_name = {group.name: group for group in alone.groups}
    table = {g.name: tuple(float(i * 7 % 5) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: max(1, g.num_units // 2) for g in structures.groups}
    plan = make_plan(structures, ScoreTable(scorer="some", channels=table), widths)
    pruned, masked = apply_plan(model, plan).eval(), masked_dense(model, plan).eval()
    with torch.no_grad():
        torch.testing.assert_close(pruned(inputs), masked(inputs), atol=1e-5, rtol=1e-4)
    gone = {cut.group: set(cut.removed) for cut in plan.cuts}
    for group in structures.groups:
        joined = [g for g in alone.groups if {(m.module, m.side) for m in g.members} <= places(group)]
        assert by_name[group.name] in joined
        for other in joined:
            for member in other.members:
                edit = next(e for e in plan.edits if (e.module, e.side) == (member.module, member.side))
                assert {i for unit in gone[group.name] for i in member.units[unit]} <= set(edit.removed)
    assert len(structures.groups) < len(alone.groups)


def places(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(member.module, member.side) for member in group.members}


@pytest.mark.parametrize(
    ("network", "tie"),
    [("dense", ("layers.*",)), ("encoder", (ENCODER_HEADS,)), ("bottleneck", ("layer1.*.conv1", "layer1.*.conv2"))],
)
def test_every_scorer_scores_tied_groups(network: str, tie: tuple[str, ...]) -> None:
    model, _ = networks.build(network)
    make = networks.NETWORKS[network][1]
    batches = [(make(), torch.arange(4) % 2) for _ in range(8)]
    structures = list_structures(model, batches[0][0], constraints=Constraints(tied=(tie,)))
    moments = observe_activations(model, structures, batches, Observe(), loss=nn.functional.cross_entropy)
    for scorer in SCORERS:
        table = score(model, structures, moments, scorer())
        for group in structures.groups:
            values = torch.tensor(table.channels[group.name])
            assert len(values) == group.num_units and values.isfinite().all(), (scorer, group.name)


def test_names_of_tied_groups_work_in_other_constraints() -> None:
    structures = structures_of(
        "encoder", tied=(("layers.*.linear1",),), least={"layers.1.linear1": 6}, uniform=("layers.*.linear1",)
    )
    assert structures.constraints == ResolvedConstraints(least={"layers.0.linear1": 6})
