"""`deploypipe.prune`: what it promises to those who only want a smaller module."""

import doctest
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import PadResNet
from torch import Tensor, nn

import deploypipe
from deploypipe import one_call_pruning
from deploypipe.errors import BudgetError, ConfigError, DataError, ModelError, PipelineError, PlanError
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.recipe import Constraints
from deploypipe.scoring.magnitude import score_magnitudes

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(count)]


@pytest.fixture
def dense() -> nn.Module:
    torch.manual_seed(0)
    return PadResNet().eval()


def difference(one: nn.Module, other: nn.Module) -> float:
    inputs = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).square().mean())


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(one_call_pruning).attempted and not doctest.testmod(one_call_pruning).failed


def test_a_ratio_removes_that_share_of_every_group_and_leaves_the_model(dense: nn.Module) -> None:
    before = deepcopy(dense.state_dict())
    dense.train()
    small = deploypipe.prune(dense, IMAGES, ratio=0.5)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    structures = deploypipe.list_structures(dense.eval(), IMAGES)
    halved = {group.name: round(group.num_units * 0.5) for group in structures.groups}
    left = {group.name: group.num_units for group in deploypipe.list_structures(deepcopy(small).eval(), IMAGES).groups}
    assert left == halved
    assert small.training  # as it was given
    small(IMAGES).square().mean().backward()  # it trains


def test_calibration_batches_repair_what_is_left(dense: nn.Module) -> None:
    plain = deploypipe.prune(dense, IMAGES, ratio=0.5).eval()
    repaired = deploypipe.prune(dense, IMAGES, ratio=0.5, calib=batches()).eval()
    assert difference(repaired, dense) < 0.7 * difference(plain, dense)


@pytest.mark.parametrize("calib", [None, batches(2)], ids=["uniform widths", "widths by loss curves"])
def test_macs_are_those_of_the_network_that_comes_out(
    dense: nn.Module, calib: list[tuple[Tensor, Tensor]] | None
) -> None:
    small = deploypipe.prune(dense, IMAGES, macs="0.5x", calib=calib)
    share = count_macs(small.eval(), IMAGES)[1] / count_macs(dense, IMAGES)[1]
    assert 0.3 < share <= 0.5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ratio": "half"}, r"prune: ratio: must be > 0 and < 1, got 'half'; 0\.5 removes"),
    ({"ratio": None, "macs": 0.5}, r"prune: macs: must be text such as '0\.5x' or '20 M', got 0\.5; .* macs='0\.5x'"),
    ({"ratio": None, "macs": 100000}, r"prune: macs: must be text such as '0\.5x' or '20 M', got 100000"),
    ({"ratio": None, "macs": "2x"}, r"prune: macs: must be below the dense network's, got 2x"),
    ({"ratio": None, "macs": "9 G"}, r"prune: macs: must be below the dense network's, got 9 G \("),
    (
        {"channel_multiple": 64},
        r"prune: channel_multiple: with 64 nothing is removed: the widest group has \d+ units; lower it",
    ),
    ({"channel_multiple": "8"}, r"prune: channel_multiple: must be a whole number >= 1, got '8'"),
    ({"ratio": 0.001}, r"prune: ratio: nothing is removed"),
    ({"keep": "fc"}, r"prune: keep: must be a list of patterns, got 'fc'; write keep=\['fc'\]"),
    ({"keep": ["*"]}, r"matches keep \(\*\).*; change the network or loosen keep$"),
    ({"calib": []}, r"prune: calib yields no batches; give at least one batch"),
]


def test_what_is_asked_wrongly_is_one_error(dense: nn.Module) -> None:
    for arguments in ({}, {"ratio": 0.5, "macs": "0.5x"}):
        with pytest.raises(ConfigError, match="ratio, macs: are both"):
            deploypipe.prune(dense, IMAGES, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio: must be > 0 and < 1, got 50"):
        deploypipe.prune(dense, IMAGES, ratio=50)
    for arguments, told in WRONG:
        with pytest.raises((ConfigError, ModelError, DataError), match=told):
            deploypipe.prune(dense, IMAGES, **{"ratio": 0.5, **arguments})
    with pytest.raises(
        ModelError, match=r"'conv1' \(Conv2d\) of the network.*example_inputs \(a tensor of shape \(2, 16\).* raised"
    ):
        deploypipe.prune(dense, torch.randn(2, 16), ratio=0.5)
    with pytest.raises(ConfigError, match=r"macs: macs = 'half' is not a number with a unit; write '0\.5x'"):
        deploypipe.prune(dense, IMAGES, macs="half")
    with pytest.raises(BudgetError, match=r"0\.0001x of the dense network is out of reach"):
        deploypipe.prune(dense, IMAGES, macs="0.0001x")
    with pytest.raises(PipelineError, match=r"calib is a Tensor; it is one batch: write calib=\[\(inputs, target\)\]"):
        deploypipe.prune(dense, IMAGES, ratio=0.5, calib=IMAGES)
    with pytest.raises(DataError, match=r"it holds \[0\]: str, \[1\]: str: write Pairs\(loader, inputs=0"):
        deploypipe.prune(dense, IMAGES, ratio=0.5, calib=[("a", "b")])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


ROWS = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


def test_what_comes_out_is_saved_with_its_plan_and_loaded(tmp_path: Path) -> None:
    small: Any = deploypipe.prune(mlp(), ROWS, ratio=0.5)
    assert [(cut["group"], len(cut["removed"])) for cut in small.pruning_plan["cuts"]] == [("0", 32), ("2", 16)]
    file = BytesIO()
    torch.save(deepcopy(small), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        again[0].weight.mul_(1.5)  # as fine-tuning would
    deploypipe.save_pruned(again, inputs=ROWS, folder=tmp_path)
    assert torch.equal(deploypipe.load_pruned(tmp_path, mlp)(ROWS), again(ROWS))
    with pytest.raises(ConfigError, match=r"load_pruned: build_model: must be a function .*got a Sequential; write"):
        deploypipe.load_pruned(tmp_path, mlp())  # type: ignore[arg-type]


def test_a_plan_that_is_absent_or_does_not_fit_is_told_at_saving(tmp_path: Path) -> None:
    small: Any = deploypipe.prune(mlp(), ROWS, ratio=0.5)
    changed = deepcopy(small)
    changed[4] = nn.Linear(16, 3)
    with pytest.raises(
        PlanError, match=r"'4.weight' has shape \(3, 16\) now, but prune\(\) left it with shape \(10, 16\)"
    ):
        deploypipe.save_pruned(changed, inputs=ROWS, folder=tmp_path)
    with pytest.raises(PlanError, match=r"this Sequential holds no plan in .pruning_plan.*or the plan"):
        deploypipe.save_pruned(mlp(), inputs=ROWS, folder=tmp_path)
    structures = deploypipe.list_structures(mlp(), ROWS)
    scores = score_magnitudes(mlp(), structures)
    plan = deploypipe.make_plan(structures, scores, {"0": 8})
    with pytest.raises(PlanError, match=r"the plan removes channels or blocks, but this is the network before that"):
        deploypipe.save_pruned(mlp(), plan, ROWS, tmp_path)
    with pytest.raises(PlanError, match=r"removes 4 out channels of '0', up to number \d+, but 32 are left, too few"):
        deploypipe.save_pruned(small, deploypipe.make_plan(structures, scores, {"0": 60}), ROWS, tmp_path)
    with pytest.raises(
        ConfigError, match=r"save_pruned: plan: must be a PruningPlan, got a str; write save_pruned\(small, i"
    ):
        deploypipe.save_pruned(small, "folder", ROWS)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_outputs_stay_by_a_constraint_and_inputs_too_by_keep() -> None:
    def widths(**arguments: Any) -> tuple[int, int]:
        small: Any = deploypipe.prune(mlp(), ROWS, ratio=0.5, **arguments)
        return small[2].in_features, small[2].out_features

    assert widths(constraints=Constraints(least={"2": 1.0})) == (32, 32)
    with pytest.raises(ModelError, match="matches keep"):
        widths(keep=["2"])
