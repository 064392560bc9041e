"""Scorers without labels (weights, gains, distances) against arithmetic by hand."""

import math
from dataclasses import replace

import networks
import pytest
import torch
from torch import Tensor, nn

from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import BatchNormScale, Fpgm, Magnitude, Observe
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.batch_norm_scale import score_batch_norm_scale
from deploypipe.scoring.fpgm import score_fpgm
from deploypipe.scoring.magnitude import completed_by_magnitude, score_magnitude


def prepared(name: str) -> tuple[nn.Module, Structures, Moments]:
    model, inputs = networks.build(name)
    structures = list_structures(model, inputs)
    return model, structures, observe_activations(model, structures, [(inputs, torch.zeros(4))], Observe())


EVERY_NETWORK = pytest.mark.parametrize("name", sorted(networks.NETWORKS))


@EVERY_NETWORK
def test_all_controls_score_every_unit_of_every_network(name: str) -> None:
    model, structures, moments = prepared(name)
    tables = (
        score_magnitude(model, structures, moments, Magnitude(power=1), 0),
        score_batch_norm_scale(model, structures, moments, BatchNormScale(), 0),
        score_fpgm(model, structures, moments, Fpgm(), 0),
    )
    for table in tables:
        assert {g.name: g.num_units for g in structures.groups} == {n: len(row) for n, row in table.channels.items()}
        assert all(math.isfinite(value) and value >= 0 for row in table.channels.values() for value in row)


def test_power_one_sums_absolute_weights_of_producers_and_readers() -> None:
    model, structures, moments = prepared("mlp")
    first, second = model[0].weight.detach().double(), model[2].weight.detach().double()
    table = score_magnitude(model, structures, moments, Magnitude(power=1), 0)
    assert table.channels["0"] == pytest.approx((first.abs().sum(1) + second.abs().sum(0)).tolist())
    squares = score_magnitude(model, structures, moments, Magnitude(), 0)
    assert squares.channels["0"] == pytest.approx((first.square().sum(1) + second.square().sum(0)).tolist())


def test_batch_norm_scale_sums_the_gains_of_all_norms_on_a_unit() -> None:
    model, structures, moments = prepared("bottleneck")
    with torch.no_grad():
        model.layer1[0].bn3.weight.neg_()
    norms = (model.layer1[0].bn3, model.layer1[0].shortcut[1], model.layer1[1].bn3)
    table = score_batch_norm_scale(model, structures, moments, BatchNormScale(), 0)
    expected = sum(norm.weight.detach().abs() for norm in norms)
    assert table.channels["layer1.0.conv3"] == pytest.approx(expected.tolist())
    assert "layer1.0.conv3" not in table.reasons


def test_batch_norm_scale_sums_the_indices_of_a_coupled_unit() -> None:
    model, structures, moments = prepared("resnext")
    group = next(g for g in structures.groups if g.name == "layer1.0.conv1")
    gain = model.layer1[0].bn1.weight.detach().abs()
    table = score_batch_norm_scale(model, structures, moments, BatchNormScale(), 0)
    expected = [float(sum(gain[i] for i in unit)) for unit in group.members[0].units]
    assert table.channels[group.name] == pytest.approx(expected)


def test_groups_without_a_gain_are_scored_by_magnitude_with_a_reason() -> None:
    model, structures, moments = prepared("mlp")
    model[3].affine, model[3].weight = False, None
    table = score_batch_norm_scale(model, structures, moments, BatchNormScale(), 0)
    assert set(table.reasons) == {"0", "2"}
    assert all("magnitude" in reason for reason in table.reasons.values())
    assert table.channels == score_magnitude(model, structures, moments, Magnitude(), 0).channels


def distances(rows: Tensor) -> list[float]:
    return [sum(float((a - b).norm()) for b in rows) for a in rows.double()]


def test_fpgm_by_hand() -> None:
    model, structures, moments = prepared("mlp")
    table = score_fpgm(model, structures, moments, Fpgm(), 0)
    assert table.channels["0"] == pytest.approx(distances(model[0].weight.detach()))


def test_fpgm_concatenates_the_weights_of_all_producers() -> None:
    model, structures, moments = prepared("bottleneck")
    producers = (model.layer1[0].conv3, model.layer1[0].shortcut[0], model.layer1[1].conv3)
    rows = torch.cat([conv.weight.detach().flatten(1) for conv in producers], dim=1)
    table = score_fpgm(model, structures, moments, Fpgm(), 0)
    assert table.channels["layer1.0.conv3"] == pytest.approx(distances(rows), rel=1e-5)


def test_fpgm_reads_transposed_convolutions_by_their_outputs() -> None:
    model, structures, moments = prepared("upsampled")
    rows = torch.cat([model.up.weight.detach().transpose(0, 1).flatten(1), model.smooth.weight.detach().flatten(1)], 1)
    table = score_fpgm(model, structures, moments, Fpgm(), 0)
    assert table.channels["up"] == pytest.approx(distances(rows), rel=1e-5)


def test_fpgm_removes_the_median_unit_whatever_its_size() -> None:
    model, structures, moments = prepared("mlp")
    with torch.no_grad():
        model[0].weight.copy_(10 + torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))
        model[0].weight[4] = model[0].weight.mean(0)
    row = score_fpgm(model, structures, moments, Fpgm(), 0).channels["0"]
    assert min(range(12), key=row.__getitem__) == 4


def test_completing_a_table_keeps_what_is_there() -> None:
    model, structures, moments = prepared("mlp")
    table = ScoreTable(scorer="x", channels={"2": (1.0,) * 8}, suggested={"2": 3}, reasons={"2": "old"})
    whole = completed_by_magnitude(model, structures, table, {"0": "because"})
    assert whole.channels["2"] == table.channels["2"]
    assert whole.channels["0"] == score_magnitude(model, structures, moments, Magnitude(), 0).channels["0"]
    assert whole == replace(table, channels=whole.channels, reasons={"2": "old", "0": "because"})
