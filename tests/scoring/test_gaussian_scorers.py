"""Scorers by kept outputs of a unit's readers, on networks with known results."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.layer_regressions import sample_inputs, weight_matrix
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import LayerwiseMi, Mipp, Observe, OutputError
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring import top_down_ranking
from deploypipe.scoring.mutual_information.layerwise_mi import score_layerwise_mi
from deploypipe.scoring.mutual_information.mipp import score_mipp
from deploypipe.scoring.output_error import score_output_error
from deploypipe.scoring.top_down_ranking import UNOBSERVED

FUNCTIONS: dict[type, Callable[..., ScoreTable]] = {
    Mipp: score_mipp,
    LayerwiseMi: score_layerwise_mi,
    OutputError: score_output_error,
}
CONFIGS = [Mipp(), Mipp(keep=0.5), Mipp(confidence=0.9), LayerwiseMi(), LayerwiseMi(joint=False), OutputError()]
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=str)
SEQUENTIAL = pytest.mark.parametrize("config", [Mipp(), LayerwiseMi(), OutputError()], ids=lambda c: c.kind)

Seen = tuple[nn.Module, Structures, Moments]


def table(seen: Seen, config: Any) -> ScoreTable:
    return FUNCTIONS[type(config)](*seen, config, 0)


def watched(model: nn.Module, inputs: Tensor, positions: int = 4, loss: Any = None) -> Seen:
    structures = list_structures(model, inputs)
    batches = [(inputs, torch.arange(len(inputs)) % 3)]
    settings = Observe(positions_per_sample=positions)
    return model, structures, observe_activations(model, structures, batches, settings, loss=loss)


def ascending(scores: tuple[float, ...]) -> list[int]:
    return sorted(range(len(scores)), key=scores.__getitem__)


def planted() -> Seen:
    """Channels 2 and 5 are duplicates, 0 never fires and 7 is constant."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(6 * 16, 3))
    conv = model[0]
    with torch.no_grad():
        conv.weight[5], conv.bias[5] = conv.weight[2], conv.bias[2]
        model[2].weight[:, 5] = model[2].weight[:, 2]
        conv.weight[[0, 7]] = 0
        conv.bias[0], conv.bias[7] = -1, 1
    return watched(model, torch.randn(64, 3, 6, 6), positions=16)


@SEQUENTIAL
def test_dead_and_constant_channels_go_first_then_exactly_one_of_two_duplicates(config: Any) -> None:
    scores = table(planted(), config).channels["0"]
    order = ascending(scores)
    assert {*order[:3]} in ({0, 7, 2}, {0, 7, 5})
    other = 7 - next(iter({*order[:3]} & {2, 5}))
    assert scores[other] > 100 * max(scores[unit] for unit in order[:3])
    assert all(a < b for a, b in pairwise(scores[unit] for unit in order))  # no ties: an order


def test_scoring_units_separately_keeps_both_duplicates() -> None:
    scores = table(planted(), LayerwiseMi(joint=False)).channels["0"]
    assert scores[2] == pytest.approx(scores[5])
    assert {*ascending(scores)[:2]} == {0, 7}
    assert min(scores[2], scores[5]) > 0.1


class Two(nn.Module):
    """One stem, two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.a(x), self.b(x)], dim=1)


@pytest.mark.parametrize("config", [Mipp(), LayerwiseMi(), LayerwiseMi(joint=False), OutputError()], ids=str)
def test_a_channel_that_one_of_two_readers_needs_is_kept_for_it(config: Any) -> None:
    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.stem.weight.copy_(torch.eye(4))
        model.a.weight[:, [1, 3]] = 0
        model.b.weight[:, 3] = 0
    scores = table(watched(model, torch.randn(512, 4)), config).channels["stem"]
    assert ascending(scores)[0] == 3
    assert scores[1] > scores[3] + 0.05


def chain() -> Seen:
    """Units 0 to 3 of the first layer are read only by hidden units 0 to 3, which hardly affect the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[1].weight[:4, :4] = 5 * torch.eye(4)
        model[1].weight[:4, 4:] = model[1].weight[4:, :4] = 0
        model[2].weight[:, :4] *= 1e-3
    return watched(model, torch.randn(512, 8), loss=F.cross_entropy)


@pytest.mark.parametrize("kind", [Mipp, LayerwiseMi])
def test_a_unit_that_feeds_only_pruned_units_scores_low(kind: Any) -> None:
    seen = chain()
    half, full = (table(seen, kind(keep=keep)).channels["0"] for keep in (0.5, 1.0))
    assert {*ascending(half)[:4]} == {0, 1, 2, 3}
    assert max(half[:4]) < 1e-2 * min(half[4:])
    assert {*ascending(full)[4:]} == {0, 1, 2, 3}  # to all outputs of the next layer they matter most


def test_the_targets_of_a_layer_are_exactly_the_kept_units_above() -> None:
    model, structures, moments = chain()
    found = score_mipp(model, structures, moments, Mipp(confidence=0.9), 0)
    kept = sorted(ascending(found.channels["1"])[-found.suggested["1"] :])
    assert 0 < len(kept) < 8
    weights = model[1].weight[kept].detach().double().T
    removal = SequentialRemoval(moments.inputs["1"].covariance, weights, [[i] for i in range(8)], noise=1.0)
    first = ascending(found.channels["0"])[0]
    assert found.channels["0"][first] == pytest.approx(float(removal.losses().min()), abs=1e-9)


def test_a_higher_confidence_prunes_harder_and_any_prunes_what_is_free() -> None:
    widths = [table(planted(), Mipp(confidence=c)).suggested["0"] for c in (1e-3, 0.5, 0.9, 0.99, 1.0)]
    assert widths[0] <= 5
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 1


@pytest.mark.parametrize("name", ["bottleneck", "dense", "encoder", "mlp", "resnext"])
def test_widths_emerge_at_random_initialisation(name: str) -> None:
    model, _ = networks.build(name)
    seen = watched(model, torch.cat([networks.NETWORKS[name][1]() for _ in range(8)]))
    low, high = (table(seen, Mipp(confidence=c)) for c in (0.5, 0.99))
    assert low.suggested.keys() == {g.name for g in seen[1].groups} - low.reasons.keys()
    assert all(1 <= high.suggested[group] <= width for group, width in low.suggested.items())
    assert not table(seen, Mipp()).suggested


@EVERY_CONFIG
@pytest.mark.parametrize("name", ["resnext", "upsampled", "dense", "flattened", "encoder"])
def test_groups_without_an_observed_reader_are_scored_by_magnitude(name: str, config: Any) -> None:
    model, batch = networks.build(name)
    seen = watched(model, batch)
    found = table(seen, config)
    observed = {g.name for g in seen[1].groups if any(m.side == "in" and m.module in seen[2].inputs for m in g.members)}
    assert found.reasons == {g.name: UNOBSERVED for g in seen[1].groups if g.name not in observed}
    assert list(found.channels) == [g.name for g in seen[1].groups]
    assert all(torch.tensor(scores).isfinite().all() for scores in found.channels.values())
    assert bool(found.reasons) == (name == "encoder")  # fused attention


def test_output_error_is_the_variance_share_that_least_squares_cannot_restore() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 9, 1), nn.Flatten(), nn.Linear(9 * 16, 3))
    with torch.no_grad():
        model[2].weight[0] *= 100  # an output of another scale counts no more than the others
    inputs = torch.randn(100, 3, 4, 4)
    scores = table(watched(model, inputs, positions=16), OutputError()).channels["0"]
    read = model[1](model[0](inputs))
    positions = torch.arange(16).expand(100, 16)
    rows = sample_inputs(model[2], read, model[2](read), positions).detach().double()
    rows = rows - rows.mean(0)
    outputs = rows @ weight_matrix(model[2]).detach().double().T
    order = ascending(scores)
    for step, unit in enumerate(order):
        kept = order[step + 1 :]
        error = outputs - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], outputs).solution if kept else outputs
        assert scores[unit] == pytest.approx(float((error.var(0) / outputs.var(0)).mean()), rel=1e-4, abs=1e-6)


def test_fisher_counts_only_outputs_that_the_loss_needs() -> None:
    model, structures, moments = chain()
    scores = table((model, structures, moments), OutputError(fisher=True)).channels["0"]
    assert max(scores[:4]) < 1e-2 * min(scores[4:])
    unlabelled = observe_activations(model, structures, [(torch.randn(8, 8), torch.zeros(8))], Observe())
    with pytest.raises(DataError, match="needs labels: return class targets with calib"):
        table((model, structures, unlabelled), OutputError(fisher=True))


@EVERY_CONFIG
def test_groups_ranked_together_are_ranked_independently(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(networks.PadBlock(8, 8, 1) for _ in range(4)), nn.Flatten(), nn.Linear(8 * 16, 3))
    seen = watched(model, torch.randn(64, 8, 4, 4))
    runs = list(top_down_ranking._runs(seen[1], dict(model.named_modules())))
    assert max(map(len, runs)) >= 4  # else nothing is ranked together here
    together = table(seen, config)
    monkeypatch.setattr(top_down_ranking, "_MAX_VALUES", 1)
    alone = table(seen, config)
    assert together.suggested == alone.suggested
    for name, scores in alone.channels.items():
        assert together.channels[name] == pytest.approx(scores, rel=1e-9, abs=1e-12)
