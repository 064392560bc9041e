"""Repair restores what surgery took, where it can be restored, and never does harm."""

from collections.abc import Sequence
from copy import deepcopy

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.pruning.apply import apply_plan
from deploypipe.pruning.plan import empty_plan, make_plan
from deploypipe.pruning.repair import repair
from deploypipe.pruning.structures import list_structures
from deploypipe.recipe import Repair
from deploypipe.records import PruningPlan, RepairReport, ScoreTable, Structures

EXACT = Repair(num_samples=256, positions_per_sample=64, ridge=1e-9)


def calibration(name: str, count: int = 256) -> Tensor:
    torch.manual_seed(7)
    make = networks.NETWORKS[name][1]
    return torch.cat([make() for _ in range(count // 4)])


def plan_of(structures: Structures, kept: float, blocks: Sequence[str] = ()) -> PruningPlan:
    """The first units of every group stay."""
    scores = {g.name: tuple(-float(i) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: max(1, round(g.num_units * kept)) for g in structures.groups}
    return make_plan(structures, ScoreTable(scorer="first", channels=scores), widths, blocks)


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


def error(model: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    expected = run(dense, inputs)
    return float((run(model, inputs) - expected).square().sum() / expected.var(0).sum() / len(expected))


def repaired(
    dense: nn.Module, plan: PruningPlan, inputs: Tensor, settings: Repair = EXACT
) -> tuple[nn.Module, nn.Module, RepairReport]:
    pruned = apply_plan(dense, plan)
    model, report = repair(dense, pruned, plan, [(inputs, torch.zeros(len(inputs)))], settings)
    return pruned, model, report


def make_redundant_(dense: nn.Module, structures: Structures) -> None:
    """Of every group the second half of the units repeats the first, or is dead; nothing is lost without it."""
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for group in structures.groups:
            half = round(group.num_units * 0.5)
            for member in group.members:
                if member.side == "in" and isinstance(modules[member.module], (nn.Linear, nn.Conv2d)):
                    continue
                for name in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(modules[member.module], name, None)
                    if tensor is None:
                        continue
                    for unit in range(half, group.num_units):
                        tensor[list(member.units[unit])] = tensor[list(member.units[unit - half])]


@pytest.mark.parametrize("name", ["mlp", "pad_resnet", "bottleneck", "flattened", "encoder", "separable"])
def test_network_without_its_duplicates_gives_the_dense_outputs_again(name: str) -> None:
    dense, inputs = networks.build(name)
    keep = ("embed", "*.self_attn")  # a norm over fewer features gives something else, and two heads are never alike
    structures = list_structures(dense, inputs, keep)
    make_redundant_(dense, structures)
    structures = list_structures(dense, inputs, keep)
    plan = plan_of(structures, 0.5)
    inputs = calibration(name)
    pruned, model, _ = repaired(dense, plan, inputs)
    fresh = calibration(name, 300)[256:]
    assert error(pruned, dense, inputs) > 1e-2
    assert error(model, dense, inputs) < 1e-6
    assert error(model, dense, fresh) < 1e-4


def chain(has_bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=has_bias),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=has_bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5, bias=has_bias),
    )


@pytest.mark.parametrize("has_bias", [True, False])
def test_chain_without_dead_channels_gives_the_dense_outputs_again(has_bias: bool) -> None:
    dense, inputs = chain(has_bias), calibration("pad_resnet")
    with torch.no_grad():
        dense[0].weight[4:] = dense[0].weight[:4]
        if has_bias:
            dense[0].bias[4:] = dense[0].bias[:4]
            dense[2].bias[4:] = 0.7  # constant channels: the next layer's bias can hold them
        dense[2].weight[4:] = 0
    structures = list_structures(dense, inputs)
    pruned, model, _ = repaired(dense, plan_of(structures, 0.5), inputs)
    assert error(pruned, dense, inputs) > 1e-2
    assert error(model, dense, inputs) < 1e-6


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_errors_never_rise_and_the_arguments_stay(name: str) -> None:
    dense, inputs = networks.build(name)
    structures = list_structures(dense, inputs)
    plan = plan_of(structures, 0.6, [b.name for b in structures.blocks[-1:]])
    inputs = calibration(name)
    dense.train()
    pruned = apply_plan(dense, plan).train()
    next(pruned.children()).eval()
    flags = [m.training for m in pruned.modules()]
    values = {id(m): deepcopy(m.state_dict()) for m in (dense, pruned)}
    batches = [(inputs[:100], torch.zeros(100)), (inputs[100:], torch.zeros(156))]
    settings = Repair(num_samples=200)
    model, report = repair(dense, pruned, plan, batches, settings)
    again, _ = repair(dense, pruned, plan, batches, settings)
    assert report.num_samples == 200
    assert report.rows
    assert all(row.error_after <= row.error_before for row in report.rows)
    assert any(row.error_after < row.error_before for row in report.rows)
    for part in (dense, pruned):
        assert all(torch.equal(value, values[id(part)][key]) for key, value in part.state_dict().items())
        assert not any(m._forward_hooks for m in part.modules())
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert error(model, dense, inputs) < error(pruned, dense, inputs)


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck", "mlp"])
def test_what_rows_say_is_what_the_network_does(name: str) -> None:
    """The last layer's row is the error of the outputs: the run that solves is the run of the repaired network."""
    dense, inputs = networks.build(name)
    structures = list_structures(dense, inputs)
    plan = plan_of(structures, 0.6, [b.name for b in structures.blocks[-1:]])
    inputs = calibration(name)
    _, model, report = repaired(dense, plan, inputs)
    assert report.rows[-1].module == [n for n, m in dense.named_modules() if isinstance(m, nn.Linear)][-1]
    expected = run(dense, inputs)
    measured = float((run(model, inputs) - expected).square().sum() / expected.var(0, unbiased=False).sum() / 256)
    assert report.rows[-1].error_after == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck", "mlp"])
def test_batch_statistics_are_the_running_ones(name: str) -> None:
    dense, inputs = networks.build(name)
    inputs = calibration(name)
    for module in dense.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    dense.train()(inputs)  # layers before the first cut keep the statistics they have
    structures = list_structures(dense, inputs)
    pruned, model, _ = repaired(dense, plan_of(structures, 0.5), inputs)
    evaluated = run(model, inputs)
    with torch.no_grad():
        trained = deepcopy(model).train()(inputs)
        before = deepcopy(pruned).train()(inputs)
    scale = float(evaluated.std())
    assert float((trained - evaluated).abs().max()) < 0.02 * scale
    assert float((before - run(pruned, inputs)).abs().max()) > 0.2 * scale


def test_weights_behind_a_norm_keep_their_length() -> None:
    """It is the size of a training step there: where it follows the solution, a fine-tune forgets the repair."""
    dense, inputs = networks.build("pad_resnet")
    for norm in (m for m in dense.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.05, 5)
    pruned, model, report = repaired(dense, plan_of(list_structures(dense, inputs), 0.5), calibration("pad_resnet"))
    solved = [model.get_submodule(row.module) for row in report.rows if not row.reason]
    convolutions = [layer for layer in solved if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) > 2
    names = {module: name for name, module in model.named_modules()}
    for layer in convolutions:
        before = pruned.get_submodule(names[layer]).get_parameter("weight").flatten(1).norm(dim=1)
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), before, rtol=1e-4, atol=1e-6)


class PreActivation(nn.Module):
    """The stem is read by a norm and by the shortcut; every sum by the next block's norm; sums are made in place."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, 1, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv1(F.relu(self.bn1(x)))
            out = self.conv2(F.relu(self.bn2(out), inplace=True))
            out += x
            return out

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.one, self.two, self.norm = self.Block(), self.Block(), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.two(self.one(self.stem(x))))).mean((2, 3)))


class ReluBeforeSum(nn.Module):
    """A ReLU in place keeps the object but not the values: the sum does not end the convolution's path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(8, 6, 3, 1, 1)
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + 1
        out = F.relu(self.bn(self.b(F.relu(self.a(x), inplace=True))), inplace=True)
        return self.fc(torch.add(out, x, alpha=0.5).add(out).mean((2, 3)))


@pytest.mark.parametrize("make", [PreActivation, ReluBeforeSum])
@pytest.mark.parametrize("number_of_blocks", [0, 1, 2])
def test_paths_that_look_alike_but_are_not(make: type[nn.Module], number_of_blocks: int) -> None:
    torch.manual_seed(0)
    dense, inputs = make(), calibration("pad_resnet")
    dense.train()(inputs)  # statistics that are not the initial ones
    structures = list_structures(dense, inputs)
    plan = plan_of(structures, 0.6, [b.name for b in structures.blocks[:number_of_blocks]])
    pruned, model, report = repaired(dense, plan, inputs)
    assert error(model, dense, inputs) < error(pruned, dense, inputs)
    expected = run(dense, inputs)
    measured = float((run(model, inputs) - expected).square().sum() / expected.var(0, unbiased=False).sum() / 256)
    assert report.rows[-1].error_after == pytest.approx(measured, rel=1e-3)


def test_nothing_cut_nothing_solved_and_no_data_is_refused() -> None:
    dense, inputs = networks.build("pad_resnet")
    structures = list_structures(dense, inputs)
    _, model, report = repaired(dense, empty_plan(structures), inputs)
    assert report.rows == ()
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(DataError, match="calib"):
        repair(dense, dense, empty_plan(structures), [], EXACT)


def test_activations_that_are_not_finite_are_refused_by_name() -> None:
    dense, inputs = networks.build("flattened")
    plan = plan_of(list_structures(dense, inputs), 0.5)
    inputs[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="conv1"):
        repaired(dense, plan, inputs)
