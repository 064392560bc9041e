"""Agreement of halves by hand, recommended numbers of samples, and shuffled labels."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from deploypipe.errors import DataError
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import ConditionalMi, LabelMi, Observe
from deploypipe.records import ScoreTable
from deploypipe.scoring.mutual_information.conditional_mi import score_conditional_mi
from deploypipe.scoring.mutual_information.label_mi import score_label_mi
from deploypipe.scoring.score_stability import recommended_samples, shuffled_null, stability


def table(*row: float) -> ScoreTable:
    return ScoreTable(scorer="x", channels={"a": row})


def test_stability_is_the_rank_correlation() -> None:
    assert stability(table(1, 2, 3), table(10, 100, 1000)) == {"a": pytest.approx(1)}
    assert stability(table(1, 2, 3), table(3, 2, 1)) == {"a": pytest.approx(-1)}
    assert stability(table(1, 2, 3, 4), table(1, 2, 4, 3)) == {"a": pytest.approx(0.8)}


def test_one_unit_is_stable_and_a_constant_is_not() -> None:
    assert stability(table(5), table(-1)) == {"a": 1.0}
    assert stability(table(1, 1, 1), table(1, 2, 3)) == {"a": 0.0}
    assert stability(table(1, 1, 1), table(1, 1, 1)) == {"a": 0.0}


def test_recommended_samples_at_the_edges() -> None:
    assert recommended_samples(0.9, 1000) == 500  # a half is enough
    assert recommended_samples(0.5, 1000) == 4500
    assert recommended_samples(1.0, 1000) == 1
    assert recommended_samples(0.0, 1000) is None
    assert recommended_samples(-0.3, 1000) is None


def test_recommended_samples_give_the_stability_that_was_asked_for() -> None:
    """Scores = truth + an error with a variance that falls with the samples."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=generator)

    def half(samples: float) -> list[float]:
        return (truth + 30 * torch.randn(4000, generator=generator) / samples**0.5).tolist()

    rho = stability(table(*half(500)), table(*half(500)))["a"]
    assert rho < 0.5
    needed = recommended_samples(rho, 1000)
    assert needed is not None
    assert spearmanr(half(needed), half(needed)).statistic == pytest.approx(0.9, abs=0.02)


def planted() -> tuple[nn.Module, Moments]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    labels = torch.arange(400) % 2
    x = torch.randn(400, 4, generator=generator) + labels.unsqueeze(1)
    return model, observe_activations(model, list_structures(model, x[:2]), [(x, labels)], Observe())


@pytest.mark.parametrize("scorer", [(score_label_mi, LabelMi()), (score_conditional_mi, ConditionalMi())])
def test_scores_of_shuffled_labels_are_near_zero(scorer: tuple[object, object]) -> None:
    model, moments = planted()
    structures = list_structures(model, torch.randn(2, 4))
    function, config = scorer

    def score(seen: Moments) -> ScoreTable:
        return function(model, structures, seen, config, 0)  # type: ignore[operator]

    null = shuffled_null(score, moments, seeds=range(4))
    assert null["0"].real == pytest.approx(sum(score(moments).channels["0"]))
    assert null["0"].shuffled < 0.1 * null["0"].real
    assert null == shuffled_null(score, moments, seeds=range(4))
    assert null != shuffled_null(score, moments, seeds=range(4, 8))


def test_groups_scored_by_another_method_have_no_baseline() -> None:
    _, moments = planted()
    aside = ScoreTable(scorer="x", channels={"a": (1.0,), "b": (2.0,)}, reasons={"b": "unseen"})
    assert set(shuffled_null(lambda _: aside, moments, seeds=[0])) == {"a"}


def test_shuffling_without_labels_is_an_error() -> None:
    _, moments = planted()
    with pytest.raises(DataError, match="labels"):
        shuffled_null(lambda _: table(1.0), replace(moments, labels=None), seeds=[0])
