"""Scorers with labels find known informative units, and report missing labels."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import ConditionalMi, LabelMi, Magnitude, Observe, Taylor
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import score_magnitude
from deploypipe.scoring.mutual_information.conditional_mi import score_conditional_mi
from deploypipe.scoring.mutual_information.label_mi import score_label_mi
from deploypipe.scoring.taylor import score_taylor

Scorer = Callable[[nn.Module, Structures, Moments, Any, int], ScoreTable]
BY_LABEL: dict[str, tuple[Scorer, Any]] = {
    "label_mi": (score_label_mi, LabelMi()),
    "conditional_mi": (score_conditional_mi, ConditionalMi()),
    "taylor": (score_taylor, Taylor()),
}
EVERY_SCORER = pytest.mark.parametrize("kind", sorted(BY_LABEL))
FROM_ROWS = pytest.mark.parametrize("kind", ["conditional_mi", "label_mi"])


def planted() -> tuple[nn.Module, Structures, Moments]:
    """Eight hidden units: 0 reads the label's own input, 5 repeats it, 3 a weaker copy, 2 and 7 never fire; 1, 4 and
    6 are noise, which the head also reads, but less, as a trained head ignores noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(3.0)
        for unit, source in ((0, 0), (5, 0), (3, 1), (1, 2), (4, 3), (6, 4)):
            model[0].weight[unit, source] = 1
        model[0].bias[[2, 7]] = -1
        model[2].weight.copy_(torch.tensor([1.0, 0.1, 1.0, 0.5, 0.1, 1.0, 0.1, 1.0]) * torch.tensor([[-1.0], [1.0]]))
        model[2].bias.copy_(-3 * model[2].weight[:, [0, 1, 3, 4, 5, 6]].sum(1))
    labels = torch.arange(600) % 2
    x = torch.randn(600, 6)
    x[:, 0] += 2.0 * labels - 1
    x[:, 1] += 1.2 * labels - 0.6
    batches = [(x[i : i + 100], labels[i : i + 100]) for i in range(0, 600, 100)]
    structures = list_structures(model, x[:2])
    return model, structures, observe_activations(model, structures, batches, Observe(), loss=F.cross_entropy)


def order_of(table: ScoreTable, group: str = "0") -> list[int]:
    row = table.channels[group]
    return sorted(range(len(row)), key=lambda unit: -row[unit])


@EVERY_SCORER
def test_the_unit_with_the_label_is_first_and_dead_units_are_last(kind: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = planted()
    table = scorer(model, structures, moments, config, 0)
    order = order_of(table)
    assert order[0] in (0, 5)
    assert set(order[-2:]) == {2, 7}
    assert table.scorer == kind
    assert not table.reasons


def test_label_mi_keeps_both_duplicates_and_conditional_mi_one() -> None:
    model, structures, moments = planted()
    assert set(order_of(score_label_mi(model, structures, moments, LabelMi(), 0))[:2]) == {0, 5}
    table = score_conditional_mi(model, structures, moments, ConditionalMi(), 0)
    order = order_of(table)
    assert order[1] == 3
    second = max(order.index(0), order.index(5))
    assert second > 1
    assert table.channels["0"][order[second]] < 0.1 * table.channels["0"][order[0]]  # little was to be had by then


def test_conditional_mi_suggests_the_informative_units() -> None:
    model, structures, moments = planted()
    table = score_conditional_mi(model, structures, moments, ConditionalMi(), 0)
    assert table.suggested == {"0": 2}
    row = table.channels["0"]
    assert len(set(row)) == len(row)


def test_taylor_scores_are_the_observed_gates() -> None:
    model, structures, moments = planted()
    table = score_taylor(model, structures, moments, Taylor(), 0)
    assert table.channels["0"] == tuple(moments.gates["0"].tolist())


def observed(name: str, batches: int = 10) -> tuple[nn.Module, Structures, Moments]:
    model, inputs = networks.build(name)
    structures = list_structures(model, inputs)
    make = networks.NETWORKS[name][1]
    data = [(make(), torch.tensor([0, 1, 0, 1])) for _ in range(batches)]

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(2).mean(2) if outputs.dim() > 2 else outputs, target)

    return model, structures, observe_activations(model, structures, data, Observe(), loss=loss)


@EVERY_SCORER
def test_groups_without_observations_are_scored_by_magnitude_with_a_reason(kind: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = observed("upsampled")
    seen = {kind: getattr(moments, kind).copy() for kind in ("units", "gates")}
    for by_group in seen.values():
        del by_group["down"]
    moments = replace(moments, **seen)
    table = scorer(model, structures, moments, config, 0)
    assert set(table.reasons) == {"down"}
    assert "magnitude" in table.reasons["down"]
    by_magnitude = score_magnitude(model, structures, moments, Magnitude(), 0)
    assert table.channels["down"] == by_magnitude.channels["down"]
    assert table.channels["up"] != by_magnitude.channels["up"]


@FROM_ROWS
def test_units_with_more_rows_than_labels_are_scored_by_magnitude(kind: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = observed("mlp")
    folded = replace(moments, units=moments.units | {"0": moments.units["0"].repeat(2, 1)})
    assert set(scorer(model, structures, folded, config, 0).reasons) == {"0"}


@FROM_ROWS
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs the class of every calibration sample"),
        (torch.full((600,), 3), "have the same"),
        (torch.arange(600), "needs .* labelled calibration samples .* 600 were kept"),
    ],
)
def test_unusable_labels_are_errors(kind: str, labels: Tensor | None, message: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = planted()
    with pytest.raises(DataError, match=f"{kind}.*{message}"):
        scorer(model, structures, replace(moments, labels=labels), config, 0)


def test_too_few_samples_is_an_error_with_the_number_needed() -> None:
    model, structures, moments = planted()
    labels = torch.arange(600) % 100
    with pytest.raises(DataError, match=r"needs 1600 labelled calibration samples \(16 for each of 100 classes\)"):
        score_label_mi(model, structures, replace(moments, labels=labels), LabelMi(), 0)
    score_label_mi(model, structures, replace(moments, labels=labels), LabelMi(num_bins=3), 0)


def test_class_numbers_may_have_gaps() -> None:
    model, structures, moments = planted()
    assert moments.labels is not None
    apart = replace(moments, labels=moments.labels * 7 - 1)
    for scorer, config in (BY_LABEL["label_mi"], BY_LABEL["conditional_mi"]):
        assert scorer(model, structures, apart, config, 0) == scorer(model, structures, moments, config, 0)


@FROM_ROWS
def test_units_that_are_not_finite_are_refused(kind: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = planted()
    broken = replace(moments, units={"0": moments.units["0"].log()})
    with pytest.raises(DataError, match="0: its units are NaN or infinite"):
        scorer(model, structures, broken, config, 0)


def test_taylor_without_derivatives_is_an_error_with_a_remedy() -> None:
    model, structures, moments = planted()
    with pytest.raises(DataError, match=r"taylor needs the derivatives .* observe_activations\(..., loss=task.loss\)"):
        score_taylor(model, structures, replace(moments, gates={}), Taylor(), 0)
    with pytest.raises(DataError, match="NaN or infinity"):
        score_taylor(model, structures, replace(moments, gates={"0": torch.full((8,), torch.nan)}), Taylor(), 0)


@FROM_ROWS
def test_fewer_samples_than_units_are_enough(kind: str) -> None:
    scorer, config = BY_LABEL[kind]
    model, structures, moments = planted()
    labels = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator).repeat(1, 12) + 0.1 * torch.randn(40, 96, generator=generator)
    rows[:, 50] += 4 * labels
    wide = replace(structures, groups=(replace(structures.groups[0], num_units=96),))
    table = scorer(model, wide, replace(moments, units={"0": rows}, labels=labels), config, 0)
    assert order_of(table)[0] == 50
    assert all(math.isfinite(value) for value in table.channels["0"])
