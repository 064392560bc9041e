"""Plans follow the requested widths, reject other models, and survive a round trip to disk."""

from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn

from deploypipe.errors import ModelError, PlanError
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe, masked_dense
from deploypipe.pruning.surgery.plan import empty_plan, make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ChannelGroup, Edit, Member, PruningPlan, ScoreTable, Structures


def one_group(num_units: int) -> Structures:
    member = Member(module="conv", side="out", units=tuple((i,) for i in range(num_units)))
    group = ChannelGroup(name="conv", num_units=num_units, members=(member,), params_per_unit=1.0, macs_per_unit=1.0)
    return Structures(model_fingerprint="s-w", groups=(group,), blocks=(), frozen=(), num_params=1, num_macs=1)


def scores(*values: float) -> ScoreTable:
    return ScoreTable(scorer="given", channels={"conv": values})


@pytest.mark.parametrize(
    ("dense", "asked", "multiple", "realised"),
    [
        (16, 9, 1, 9),
        (16, 9, 4, 8),
        (16, 10, 4, 12),  # halfway goes up
        (16, 1, 8, 8),  # at least one multiple
        (12, 7, 8, 8),
        (12, 12, 8, 12),  # whole as asked
        (12, 11, 8, 8),
        (13, 12, 4, 12),
        (11, 10, 4, 11),  # 12 would be more than there are
        (6, 3, 8, 6),  # narrower than one multiple
        (16, 20, 1, 16),
    ],
)
def test_widths_are_rounded_to_multiples(dense: int, asked: int, multiple: int, realised: int) -> None:
    plan = make_plan(one_group(dense), scores(*range(dense)), {"conv": asked}, channel_multiple=multiple)
    kept = dense - len(plan.cuts[0].removed) if plan.cuts else dense
    assert kept == realised
    if asked != realised:
        assert plan.cuts[0].asked == asked
        assert plan.cuts[0].reason
    elif plan.cuts:
        assert plan.cuts[0].reason == ""


def test_best_scores_stay_and_ties_keep_the_lower_index() -> None:
    plan = make_plan(one_group(5), scores(0.1, 0.5, 0.5, 0.5, 0.9), {"conv": 3})
    assert plan.cuts[0].removed == (0, 3)
    assert plan.edits == (Edit(module="conv", side="out", removed=(0, 3)),)


def test_impossible_requests_are_errors() -> None:
    structures = one_group(3)
    with pytest.raises(PlanError, match="no such channel group"):
        make_plan(structures, scores(1, 2, 3), {"other": 1})
    with pytest.raises(PlanError, match="cannot keep 0"):
        make_plan(structures, scores(1, 2, 3), {"conv": 0})
    with pytest.raises(PlanError, match="no finite score"):
        make_plan(structures, scores(1, 2, float("nan")), {"conv": 1})
    with pytest.raises(PlanError, match="no finite score"):
        make_plan(structures, scores(1, 2), {"conv": 1})
    with pytest.raises(PlanError, match="no such block"):
        make_plan(structures, scores(1, 2, 3), {}, ["layer"])
    model, inputs = networks.build("pad_resnet")
    with pytest.raises(PlanError, match="changes the shape"):
        make_plan(list_structures(model, inputs), scores(), {}, ["stages.1.0"])


def half_plan(model: nn.Module, inputs: Tensor) -> PruningPlan:
    structures = list_structures(model, inputs)
    table = {g.name: tuple(float(i % 5) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: g.num_units // 2 for g in structures.groups}
    return make_plan(structures, ScoreTable(scorer="some", channels=table), widths, [structures.blocks[1].name])


def test_groups_inside_removed_blocks_are_left_out() -> None:
    model, inputs = networks.build("pad_resnet")
    plan = half_plan(model, inputs)
    assert plan.blocks == ("stages.0.1",)
    assert "stages.0.1.conv1" not in {cut.group for cut in plan.cuts}
    assert not any(edit.module.startswith("stages.0.1.") for edit in plan.edits)
    report = describe(model, apply_plan(model, plan), plan, inputs)
    assert [row.realised for row in report.rows if row.kind == "block"] == [0]
    assert report.params_after < report.params_before
    assert report.macs_after < report.macs_before


def test_a_plan_for_another_model_is_an_error_that_says_what_differs() -> None:
    model, inputs = networks.build("pad_resnet")
    plan = half_plan(model, inputs)
    with pytest.raises(PlanError, match="another structure"):
        apply_plan(networks.PadResNet(widths=(8, 16, 24)), plan)
    with pytest.raises(PlanError, match="other weights"):
        apply_plan(networks.PadResNet(), plan)
    with pytest.raises(PlanError, match="other weights"):
        masked_dense(networks.PadResNet(), plan)
    with pytest.raises(PlanError, match="another structure"):
        apply_plan(apply_plan(model, plan), plan)


@pytest.mark.parametrize(
    "edit",
    [
        Edit(module="conv9", side="out", removed=(0,)),
        Edit(module="conv1", side="out", removed=(99,)),
        Edit(module="conv1", side="out", removed=tuple(range(8))),
        Edit(module="stages", side="out", removed=(0,)),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Edit) -> None:
    model, inputs = networks.build("pad_resnet")
    plan = replace(empty_plan(list_structures(model, inputs)), edits=(edit,))
    with pytest.raises(PlanError, match="new plan"):
        apply_plan(model, plan)


def test_a_saved_network_loads_with_and_without_its_class(tmp_path: Path) -> None:
    model, inputs = networks.build("pad_resnet")
    plan = half_plan(model, inputs)
    pruned = apply_plan(model, plan).eval()
    with torch.no_grad():
        next(pruned.parameters()).mul_(1.5)  # as a repair or a fine-tune would
    save_pruned(pruned, plan, inputs, tmp_path)
    batch = torch.randn(7, 3, 8, 8)
    program, module = load_saved(tmp_path, trust_program=True), load_saved(tmp_path, networks.PadResNet)
    with torch.no_grad():
        assert torch.equal(module(batch), pruned(batch))
        torch.testing.assert_close(program(batch), pruned(batch), atol=1e-5, rtol=1e-4)
        assert program(batch[:1]).shape == (1, 10)
    module.train()(batch).sum().backward()
    with pytest.raises(PlanError, match="another structure"):
        load_saved(tmp_path, lambda: networks.PadResNet(blocks=1))
    assert not any(str(Path(__file__).parents[1]).encode() in file.read_bytes() for file in tmp_path.iterdir())

    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    for build_model in (None, networks.PadResNet):
        with pytest.raises(ModelError, match=r"weights\.safetensors was changed"):
            load_saved(tmp_path, build_model)
    (tmp_path / "hashes.json").unlink()
    with pytest.raises(ModelError, match="not a finished pruned network"):
        load_saved(tmp_path)


def test_keyword_inputs_are_saved_too(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.out(self.a(left) * self.b(right))

    model, inputs = Named().eval(), {"left": torch.randn(3, 4), "right": torch.randn(3, 4)}
    plan = empty_plan(list_structures(model, inputs))
    save_pruned(model, plan, inputs, tmp_path)
    torch.testing.assert_close(load_saved(tmp_path, trust_program=True)(**inputs), model(**inputs))


def test_a_channels_last_network_is_saved(tmp_path: Path) -> None:
    model, inputs = networks.build("pad_resnet")
    plan = empty_plan(list_structures(model, inputs))
    save_pruned(model.eval().to(memory_format=torch.channels_last), plan, inputs, tmp_path / "saved")
    loaded = load_saved(tmp_path / "saved", lambda: networks.build("pad_resnet")[0])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
