"""The summary of scores for the user."""

import networks
import pytest
import torch

from deploypipe.errors import DataError
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.pass_statistics import merge
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import LabelMi, Magnitude, Mipp, Observe, Random
from deploypipe.records import ScoreTable
from deploypipe.scoring import score_halves
from deploypipe.scoring.score_summary import kept_information, num_redundant, summarise


def test_cumulative_scores_are_losses_and_other_scores_are_summed() -> None:
    assert kept_information([4.0, 1.0, 3.0], is_cumulative=True) == (0.0, 0.25, 0.75, 1.0)
    assert kept_information([4.0, 1.0, 3.0], is_cumulative=False) == (0.0, 0.5, 0.875, 1.0)
    assert kept_information([0.0, 0.0], is_cumulative=True) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("share", "redundant"), [(1.0, 0), (0.9, 1), (0.75, 1), (0.2, 2), (0.0, 3)])
def test_redundant_units_keep_the_share_of_information(share: float, redundant: int) -> None:
    assert num_redundant((0.0, 0.25, 0.9, 1.0), share) == redundant


def test_summary_of_a_network() -> None:
    model, inputs = networks.build("pad_resnet")
    structures = list_structures(model, inputs)
    batches = [(torch.randn(16, *inputs.shape[1:]), torch.zeros(16)) for _ in range(4)]
    halves = observe_halves(model, structures, batches, Observe())
    whole = merge(*halves)
    tables = {s.kind: score_halves(model, structures, halves, whole, s) for s in (Mipp(), Magnitude(), Random())}
    assert all(rho == 1.0 for rho in tables["magnitude"].stability.values())  # it sees no samples
    found = list(tables["mipp"].stability.values())
    assert all(-1 <= rho <= 1 for rho in found)
    assert 0.2 < sum(found) / len(found) < 1.0
    summary = summarise(structures, tables["mipp"], whole)
    assert [g.name for g in summary.groups] == [g.name for g in structures.groups]
    assert all(a >= b >= c for a, b, c in (group.redundant for group in summary.groups))
    assert summary.num_samples == 64
    assert sum(map(len, summary.clusters)) == len(structures.blocks)


def test_too_few_samples_for_halves_lose_only_the_stability() -> None:
    model, inputs = networks.build("pad_resnet")
    structures = list_structures(model, inputs)
    batches = [(torch.randn(20, *inputs.shape[1:]), torch.arange(20) % 2) for _ in range(2)]
    halves = observe_halves(model, structures, batches, Observe())
    table = score_halves(model, structures, halves, merge(*halves), LabelMi())
    assert table.channels
    assert table.stability == {}
    with pytest.raises(DataError, match="20 were kept"):
        score_halves(model, structures, halves, halves[0], LabelMi())


def test_unstable_rankings_are_named_with_the_samples_they_need() -> None:
    model, inputs = networks.build("pad_resnet")
    structures = list_structures(model, inputs)
    halves = observe_halves(model, structures, [(inputs, torch.zeros(len(inputs)))] * 2, Observe())
    channels = {group.name: tuple(map(float, range(group.num_units))) for group in structures.groups}
    names = list(channels)
    for lowest, wanted in ((0.5, 36), (-0.1, None)):
        stability = {**dict.fromkeys(names, 0.95), names[0]: lowest}
        table = ScoreTable(scorer="given", channels=channels, stability=stability)
        summary = summarise(structures, table, merge(*halves))
        assert summary.shaky == (names[0],)
        assert summary.samples_wanted == wanted
