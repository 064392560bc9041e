"""Mutual-information-preserving pruning in closed Gaussian form (arXiv:2411.00147; derivation in `numerics`).

A unit is a group of regressors (its taps) of every layer that reads it. The score is the information about those
layers' kept outputs that is lost with it, after all units of lower score were removed.
"""

from collections.abc import Sequence
from dataclasses import replace

from scipy.stats import chi2
from torch import nn

from deploypipe.numerics.grouped_gaussian_mi import SequentialRemoval
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Mipp
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.top_down_ranking import (
    Ranking,
    Reader,
    cumulative,
    of_one_shape,
    rankings_of,
    remove_greedily,
    score_top_down,
)


def score_mipp(model: nn.Module, structures: Structures, moments: Moments, config: Mipp, seed: int) -> ScoreTable:
    """Score = cumulative nats lost when a unit is removed in greedy order; the last unit has the highest score.

    With a `confidence`, every group also gets the width at which the method stops (see `_width`). Only the units of
    that width are targets for the layers below. Groups whose consumers could not be observed are scored by magnitude,
    without a suggested width.
    """

    def rank(readers: list[Reader]) -> list[Ranking]:
        problems = [
            SequentialRemoval(r.covariance, r.weights, r.regressors, noise=config.noise) for r in of_one_shape(readers)
        ]
        order, losses = remove_greedily(problems, len(readers[0].regressors))
        rankings = rankings_of(cumulative(order, losses))
        if config.confidence is None:
            return rankings
        widths = [_width(row, readers, moments.num_samples, config.confidence) for row in losses.tolist()]
        return [replace(ranking, suggested=width) for ranking, width in zip(rankings, widths, strict=True)]

    return score_top_down(model, structures, moments, rank, scorer=config.kind, is_cumulative=True, keep=config.keep)


def _width(losses: Sequence[float], readers: Sequence[Reader], num_samples: int, confidence: float) -> int:
    """How many units stay if greedy removal stops at the first unit that costs significant information.

    The closed form of the paper's test (keep a node only if it is more than x % certain that it transfers entropy, from
    five estimates): removing a unit loses I(unit; outputs | units left) nats; 2 N times that is the likelihood ratio
    statistic of the hypothesis that the outputs do not depend on the unit, given the others. It is compared with the
    chi-square quantile at `confidence`. The degrees of freedom are the unit's weights: taps x kept outputs, summed over
    the readers. N counts samples, not positions, which are not independent. As in the paper, a higher confidence prunes
    at least as much for the same targets; 1 leaves one unit. The outputs are exact and the noise is only the floor, so
    this is the power of the test at that noise, not an error rate.
    """
    weights = sum(len(reader.regressors[0]) * reader.weights.shape[2] for reader in readers)
    limit = float(chi2.ppf(confidence, weights))
    significant = [step for step, loss in enumerate(losses) if not 2 * num_samples * loss < limit]
    return max(1, len(losses) - significant[0]) if significant else 1
