"""The contract of every scorer, and what the information-preserving one finds."""

import math
from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import LayerwiseMi, Magnitude, Mipp, Observe, OutputError, Random
from deploypipe.records import ChannelGroup, Structures
from deploypipe.scoring import SCORERS, score
from deploypipe.scoring.top_down_ranking import cumulative, remove_greedily

VARIANTS = (Magnitude(power=1), Mipp(keep=0.5, confidence=0.9), LayerwiseMi(joint=False), OutputError(fisher=True))
EVERY_SCORER = pytest.mark.parametrize("scorer", [*(kind() for kind in SCORERS), *VARIANTS], ids=str)


@cache
def prepared(name: str) -> tuple[nn.Module, Structures, Moments]:
    """The same for all tests: what changes the network takes a copy."""
    model, inputs = networks.build(name)
    structures = list_structures(model, inputs)
    batches = [(networks.NETWORKS[name][1](), torch.tensor([0, 1, 1, 0])) for _ in range(10)]
    loss = lambda outputs, target: outputs.square().mean()  # noqa: E731  # any derivative will do
    return model, structures, observe_activations(model, structures, batches, Observe(), loss=loss)


@EVERY_SCORER
@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_contract(name: str, scorer: Any) -> None:
    model, structures, moments = prepared(name)
    model.train()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    covariances = {key: seen.covariance.clone() for key, seen in moments.inputs.items()}
    table = score(model, structures, moments, scorer, seed=3)
    assert table.scorer == scorer.kind
    assert {g.name: g.num_units for g in structures.groups} == {n: len(row) for n, row in table.channels.items()}
    assert all(math.isfinite(value) for row in table.channels.values() for value in row)
    assert set(table.suggested) <= set(table.channels) >= set(table.reasons)
    assert all(1 <= width <= len(table.channels[group]) for group, width in table.suggested.items())
    assert table == score(model, structures, moments, scorer, seed=3)
    assert model.training
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(moments.inputs[key].covariance, value) for key, value in covariances.items())


def test_random_depends_on_the_seed() -> None:
    model, structures, moments = prepared("mlp")
    first, second = (score(model, structures, moments, Random(), seed=s) for s in (0, 1))
    assert first.channels != second.channels


@pytest.mark.parametrize("name", ["pad_resnet", "resnext", "upsampled", "separable", "encoder"])
def test_magnitude_is_the_energy_of_a_units_weights(name: str) -> None:
    """Scaling a unit's weights in its first producer by 3 adds 8 times their energy, and changes no other unit."""
    model, structures, moments = prepared(name)
    model, group = deepcopy(model), structures.groups[0]
    producer = next(m for m in group.members if m.side == "out" and model.get_submodule(m.module).weight.dim() > 1)
    weight = model.get_submodule(producer.module).weight
    before = score(model, structures, moments, Magnitude()).channels[group.name]
    index = list(producer.units[0])
    is_second_axis = isinstance(model.get_submodule(producer.module), (nn.Embedding, nn.ConvTranspose2d))
    with torch.no_grad():
        rows = weight[:, index] if is_second_axis and weight.shape[1] > 1 else weight[index]
        energy = float(rows.double().square().sum())
        if is_second_axis and weight.shape[1] > 1:
            weight[:, index] *= 3
        else:
            weight[index] *= 3
    after = score(model, structures, moments, Magnitude()).channels[group.name]
    assert after[0] - before[0] == pytest.approx(8 * energy, rel=1e-5)
    assert after[1:] == before[1:]


def planted() -> tuple[nn.Module, Structures, Moments, ChannelGroup]:
    """Channel 5 repeats channel 2; channels 0 and 7 never fire."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, 1, 1), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(6 * 36, 3))
    conv = model[0]
    with torch.no_grad():
        conv.weight[5], conv.bias[5] = conv.weight[2], conv.bias[2]
        conv.weight[[0, 7]] = 0
        conv.bias[[0, 7]] = -1
    batches = [(torch.randn(64, 3, 6, 6), torch.zeros(64))]
    structures = list_structures(model, batches[0][0])
    moments = observe_activations(model, structures, batches, Observe(positions_per_sample=36))
    return model, structures, moments, next(g for g in structures.groups if g.name == "0")


def test_mipp_removes_dead_channels_then_exactly_one_of_two_duplicates() -> None:
    model, structures, moments, group = planted()
    scores = score(model, structures, moments, Mipp()).channels[group.name]
    order = sorted(range(8), key=lambda unit: scores[unit])
    assert set(order[:2]) == {0, 7}
    assert order[2] in (2, 5)
    assert order[3] not in (2, 5)
    assert scores[order[2]] < 0.1 * scores[order[3]]


def test_mipp_counts_what_every_reader_loses() -> None:
    """A channel that one of two readers ignores is kept for the other."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([self.a(x), self.b(x)], dim=1)

    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.a.weight[:, 1] = 0
        model.a.weight[:, 3] = 0
        model.b.weight[:, 3] = 0
    batches = [(torch.randn(256, 4), torch.zeros(256))]
    structures = list_structures(model, batches[0][0])
    scores = score(model, structures, observe_activations(model, structures, batches, Observe()), Mipp()).channels[
        "stem"
    ]
    assert min(range(4), key=lambda unit: scores[unit]) == 3
    assert scores[1] > scores[3] + 0.1


def problem(num_units: int, outputs: int, seed: int) -> SequentialRemoval:
    generator = torch.Generator().manual_seed(seed)
    p = 2 * num_units
    root = torch.randn(p, p + 12, generator=generator, dtype=torch.float64)
    weights = torch.randn(p, outputs, generator=generator, dtype=torch.float64)
    return SequentialRemoval(root @ root.T / p, weights, [[i, i + 1] for i in range(0, p, 2)], noise=0.01)


def greedy_order(full: SequentialRemoval, num_units: int) -> list[int]:
    left, order = list(range(num_units)), []
    while left:
        order.append(left.pop(int(full.losses(left).argmin())))
        full.remove_(order[-1])
    return order


@pytest.mark.parametrize("seed", range(4))
def test_narrow_groups_are_removed_in_exactly_greedy_order(seed: int) -> None:
    scores = cumulative(*remove_greedily([problem(24, 5, seed)], 24))
    assert all(a < b for a, b in pairwise(sorted(scores)))  # no ties: an order
    assert sorted(range(24), key=lambda unit: scores[unit]) == greedy_order(problem(24, 5, seed), 24)


def test_wide_groups_lose_hardly_more_than_in_greedy_order() -> None:
    lost = sorted(cumulative(*remove_greedily([problem(160, 60, 0)], 160)))[80]
    full, exact = problem(160, 60, 0), 0.0
    for unit in greedy_order(problem(160, 60, 0), 160)[:81]:
        exact += float(full.losses([unit]))
        full.remove_(unit)
    assert lost < 1.05 * exact
