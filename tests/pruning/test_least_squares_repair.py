"""Repair restores the outputs where that is possible, and never makes them worse."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import empty_plan, make_plan
from deploypipe.pruning.tracing.structures import list_structures
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
    """In every group the second half of the units repeats the first or is dead, so removing it loses nothing."""
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for group in structures.groups:
            half = round(group.num_units * 0.5)
            for member in group.members:
                for tensor, axis in written(modules[member.module], member.side):
                    kept = [i for unit in range(half, group.num_units) for i in member.units[unit - half]]
                    gone = [i for unit in range(half, group.num_units) for i in member.units[unit]]
                    tensor.movedim(axis, 0)[gone] = tensor.movedim(axis, 0)[kept].clone()


def written(module: nn.Module, side: str) -> list[tuple[Tensor, int]]:
    """The tensors that produce a module's outputs, and their axis."""
    if side not in ("in", "out"):
        name, _, axis = side.rpartition(".")
        return [(getattr(module, name), int(axis))] if side in ("weight.1", "bias.0") else []
    if side == "in" and isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return []
    second = isinstance(module, nn.ConvTranspose2d) and module.groups == 1
    found = {name: getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
    return [(t, int(second and name == "weight")) for name, t in found.items() if t is not None]


@pytest.mark.parametrize("name", ["mlp", "pad_resnet", "bottleneck", "flattened", "encoder", "separable"])
def test_removing_duplicates_restores_the_dense_outputs(name: str) -> None:
    dense, inputs = networks.build(name)
    keep = (
        ("embed", "*.self_attn") if name == "encoder" else ()
    )  # a norm over fewer features gives something else, and two heads are never alike
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
def test_removing_dead_channels_restores_the_dense_outputs(has_bias: bool) -> None:
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
def test_errors_never_rise_and_arguments_are_unchanged(name: str) -> None:
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
    solved = [(r.error_before, r.error_after) for r in report.rows if None not in (r.error_before, r.error_after)]
    assert all(after <= before for before, after in solved)
    assert any(after < before for before, after in solved)
    for part in (dense, pruned):
        assert all(torch.equal(value, values[id(part)][key]) for key, value in part.state_dict().items())
        assert not any(m._forward_hooks for m in part.modules())
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert error(model, dense, inputs) < error(pruned, dense, inputs)


@pytest.mark.parametrize("name", ["pad_resnet", "bottleneck", "mlp"])
def test_reported_errors_are_those_of_the_network(name: str) -> None:
    """The last layer's row is the error of the repaired network's outputs."""
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
def test_batch_statistics_equal_running_statistics(name: str) -> None:
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


def test_weights_before_a_norm_keep_their_length() -> None:
    """Their length sets the size of a training step: with the solution's length a fine-tune loses the repair."""
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
    """A norm and the shortcut read the stem, the next block's norm every sum; sums are computed in place."""

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
    """A ReLU in place keeps the object but not the values, so the sum does not end the convolution's path."""

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
def test_similar_paths_are_distinguished(make: type[nn.Module], number_of_blocks: int) -> None:
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


def test_an_empty_plan_solves_nothing_and_missing_data_is_an_error() -> None:
    dense, inputs = networks.build("pad_resnet")
    structures = list_structures(dense, inputs)
    _, model, report = repaired(dense, empty_plan(structures), inputs)
    assert report.rows == ()
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(DataError, match="calib"):
        repair(dense, dense, empty_plan(structures), [], EXACT)


def test_non_finite_activations_are_an_error_with_the_layer_name() -> None:
    dense, inputs = networks.build("flattened")
    plan = plan_of(list_structures(dense, inputs), 0.5)
    inputs[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="conv1"):
        repaired(dense, plan, inputs)


class Between(nn.Module):
    """A layer of some kind between plain layers, with wrong inputs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=2), nn.BatchNorm2d(8)
        self.layers, self.head = nn.Sequential(*layers), nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.norm(self.second(F.relu(self.first(x)))))))


class ConcatUNet(nn.Module):
    """An encoder and a decoder that reads the concatenation with the encoder's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.up = (
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.Conv2d(8, 12, 2, 2),
            nn.ConvTranspose2d(12, 8, 2, 2),
        )
        self.mix, self.head = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.enter(x))
        low = F.relu(self.up(F.relu(self.down(high))))
        return self.head(F.relu(self.mix(torch.cat([high, low], dim=1))))


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as in `transformers.pytorch_utils`."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.fc = nn.Embedding(30, 8), Conv1D(24, 8), Conv1D(8, 24), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.fc(x + self.down(F.gelu(self.up(x))))


def with_norm(layer: nn.Module) -> list[nn.Module]:
    return [layer, nn.LazyBatchNorm2d(), nn.ReLU()]


def grid() -> Tensor:
    return torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(7))


EACH_KIND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "grouped": (lambda: Between(*with_norm(nn.Conv2d(8, 12, 3, 1, 1, groups=4, bias=False))), grid),
    "grouped with bias": (lambda: Between(nn.Conv2d(8, 12, 3, 2, 1, groups=2), nn.ReLU()), grid),
    "depthwise": (lambda: Between(*with_norm(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False))), grid),
    "depthwise with bias": (lambda: Between(nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.GELU()), grid),
    "several filters a channel": (lambda: Between(*with_norm(nn.Conv2d(8, 16, 3, groups=8))), grid),
    "transposed": (lambda: Between(*with_norm(nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1))), grid),
    "transposed with bias": (lambda: Between(nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU()), grid),
    "transposed in groups": (lambda: Between(*with_norm(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2))), grid),
    "transposed by channel": (lambda: Between(*with_norm(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8))), grid),
    "same": (lambda: Between(*with_norm(nn.Conv2d(8, 6, (2, 3), padding="same", dilation=2))), grid),
    "reflect": (lambda: Between(*with_norm(nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"))), grid),
    "circular": (lambda: Between(nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular"), nn.ReLU()), grid),
    "Conv1D": (Gpt, lambda: torch.randint(0, 30, (256, 7), generator=torch.Generator().manual_seed(7))),
    "concatenation": (ConcatUNet, grid),
    "DenseNet": (networks.Dense, grid),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EACH_KIND)
def test_each_kind_of_layer_is_solved_and_never_gets_worse(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, batch = EACH_KIND[name]
    dense, inputs = make(), batch()
    dense.train()(inputs)  # makes lazy layers, and statistics
    structures = list_structures(dense.eval(), inputs[:2])
    plan = plan_of(structures, 0.5)
    pruned, model, report = repaired(dense, plan, inputs, Repair(positions_per_sample=16))
    mixers = {n for n, m in dense.named_modules() if getattr(m, "weight", torch.zeros(0)).dim() > 1}
    rows = {row.module: row for row in report.rows}
    assert rows.keys() == mixers - {n for n, m in dense.named_modules() if isinstance(m, nn.Embedding)}
    assert {row.reason for row in report.rows} <= {"", "nothing to repair", "no solution lowers it"}
    for row in report.rows:
        assert row.error_before is not None and row.error_after is not None
        assert row.error_after <= row.error_before
    for special in {"layers.0", "down", "mix", "layers.2"} & rows.keys():
        assert rows[special].reason == ""
    assert error(model, dense, inputs) < 0.9 * error(pruned, dense, inputs)


@pytest.mark.parametrize("name", [*EACH_KIND, "resnext"])
def test_each_kind_of_layer_is_restored_exactly_if_nothing_was_lost(name: str) -> None:
    """The second half of each layer's outputs is repeated or dead, so the first half restores everything."""
    torch.manual_seed(0)
    make, batch = EACH_KIND.get(name, (lambda: networks.BottleneckNet(groups=2), grid))
    dense, inputs = make(), batch()
    dense.train()(inputs)
    keep = ["embed"] if name == "Conv1D" else []
    structures = list_structures(dense.eval(), inputs[:2], keep)
    make_redundant_(dense, structures)
    structures = list_structures(dense, inputs[:2], keep)
    settings = Repair(num_samples=256, positions_per_sample=256, ridge=1e-9)
    pruned, model, _ = repaired(dense, plan_of(structures, 0.5), inputs, settings)
    assert error(pruned, dense, inputs) > 1e-3
    assert error(model, dense, inputs) < 1e-5


class Unsolvable(nn.Module):
    """Layers that a regression must not change, and one ordinary layer."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, 3 * self.weight, self.bias)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.scaled, self.own = nn.Linear(6, 8), nn.Linear(8, 8), self.Scaled(8, 8), self.Own()
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.keyword, self.unused, self.hidden, self.fc = (nn.Linear(8, n) for n in (8, 8, 16, 4))
        self.back = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.twice(F.relu(self.twice(x)))
        x = self.own(self.computed(self.scaled(x)))
        x = self.back(F.relu(self.hidden(self.other(F.relu(self.tied(x))))))
        return self.fc(self.keyword(input=x))


def test_unsolvable_layers_are_unchanged_and_reported_with_a_reason() -> None:
    torch.manual_seed(0)
    dense, inputs = Unsolvable(), torch.randn(256, 6)
    structures = list_structures(dense, inputs[:2])
    pruned, model, report = repaired(dense, plan_of(structures, 0.5), inputs)
    reasons = {row.module: row.reason for row in report.rows if row.error_before is None}
    assert reasons == {
        "twice": "is called more than once",
        "scaled": "does not compute what its weights say",
        "own": "only the code of Own knows what it computes with matrix",
        "computed": "its weights are computed from other tensors",
        "tied": "shares its weights with another module",
        "other": "shares its weights with another module",
        "keyword": "is called with its input as a keyword argument, which hooks do not see",
        "unused": "is not called",
    }
    for name in reasons:
        for key, value in model.get_submodule(name).state_dict().items():
            assert torch.equal(value, pruned.get_submodule(name).state_dict()[key])
    assert error(model, dense, inputs) <= error(pruned, dense, inputs)


def test_padding_is_ignored() -> None:
    """The repaired weights do not depend on padding values, and real positions get better."""
    torch.manual_seed(0)
    dense = Gpt()
    tokens = torch.randint(1, 30, (256, 7)).masked_fill(torch.arange(7) >= torch.randint(2, 8, (256, 1)), 0)
    plan = plan_of(list_structures(dense, tokens[:2], ["embed"]), 0.5)
    batches, real = [(tokens, torch.zeros(256))], tokens != 0
    found, errors = [], []
    for mask in (None, lambda x: x != 0):
        for padding in (1.0, 30.0):
            with torch.no_grad():
                dense.embed.weight[0] = padding
            plan = replace(plan, model_fingerprint=model_fingerprint(dense))
            model, _ = repair(dense, apply_plan(dense, plan), plan, batches, Repair(), real_tokens=mask)
            found.append(model.down.weight)
            errors.append(float((run(model, tokens) - run(dense, tokens))[real].square().mean()))
    torch.testing.assert_close(found[2], found[3])
    assert not torch.allclose(found[0], found[1])
    assert errors[2] < errors[0] and errors[3] < errors[1]
