"""The trained reference removes redundant units, and orders units as the closed form does."""

from functools import cache

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from deploypipe.scoring.mutual_information.mipp_trained_network import score_mipp_predictive

UNITS = [[i] for i in range(10)]
DEAD, DUPLICATES = {4, 9}, {2, 6}


def planted(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(X, Y, B): ten regressors of growing weight; two are constant and two are equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 10, generator=generator)
    x[:, 4], x[:, 9], x[:, 6] = 0.7, 0.0, x[:, 2]
    size = torch.tensor([0.6, 0.8, 0.7, 1.2, 1.0, 1.5, 0.7, 1.9, 2.4, 1.0])
    direction = torch.nn.functional.normalize(torch.randn(10, 6, generator=generator), dim=1)
    weights = direction * size.unsqueeze(1)
    weights[6] = weights[2]  # together a middling unit, whichever of them stays
    return x, x @ weights, weights


@cache
def scored(seed: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    x, y, _ = planted(seed)
    return score_mipp_predictive(x, y, UNITS, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_it_removes_dead_units_and_one_of_two_duplicates(seed: int) -> None:
    scores, kept = scored(seed)
    removed = set(range(10)) - set(kept)
    assert removed >= DEAD
    assert len(removed & DUPLICATES) == 1
    assert removed <= DEAD | DUPLICATES
    assert max(scores[unit] for unit in removed) < min(scores[unit] for unit in kept)


@pytest.mark.parametrize("seed", range(2))
def test_it_agrees_with_the_closed_form(seed: int) -> None:
    from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
    from deploypipe.scoring.top_down_ranking import cumulative, remove_greedily

    x, _, weights = planted(seed)
    covariance = torch.cov(x.T.double(), correction=0)
    closed = cumulative(*remove_greedily([SequentialRemoval(covariance, weights.double(), UNITS, noise=1.0)], 10))
    scores, _ = scored(seed)
    first, second = (tuple(sorted(row[unit] for unit in DUPLICATES)) for row in (closed, scores))
    others = [unit for unit in range(10) if unit not in DUPLICATES]  # which of two duplicates goes first is chance
    agreement = spearmanr([*(closed[u] for u in others), *first], [*(scores[u] for u in others), *second]).statistic
    assert agreement >= 0.8


def test_a_unit_may_be_several_columns() -> None:
    x, y, _ = planted(0)
    _, kept = score_mipp_predictive(x, y, [[4, 9], [0, 1, 2], [3, 5, 6, 7, 8]])
    assert kept == (1, 2)


def test_results_depend_only_on_the_seed() -> None:
    x, y, _ = planted(0)
    units = [[0, 1, 2], [3, 5, 6], [7, 8]]
    first, again, other = (score_mipp_predictive(x[:60], y[:60], units, repeats=2, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_last_unit_stays_even_without_information() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 3, generator=generator), torch.randn(80, 2, generator=generator)
    _, kept = score_mipp_predictive(x, y, [[0], [1], [2]], confidence=1.0)
    assert len(kept) == 1
