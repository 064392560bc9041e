"""Score units by mutual information with the kept units above them (Fan et al., arXiv:2108.12594), Gaussian form."""

import torch
from torch import Tensor, nn

from deploypipe.numerics.grouped_gaussian_mi import SequentialSelection
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import LayerwiseMi
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.top_down_ranking import (
    Ranking,
    Reader,
    cumulative,
    of_one_shape,
    over_readers,
    rankings_of,
    score_top_down,
    take_greedily,
)


def score_layerwise_mi(
    model: nn.Module, structures: Structures, moments: Moments, config: LayerwiseMi, seed: int
) -> ScoreTable:
    """Score = nats about the kept outputs of all readers, summed over the readers.

    joint: units are chosen one by one, each time the one that adds most to those chosen. The score is the information
    still missing when a unit was chosen, so the first has the highest. Otherwise the score is the unit's own
    information, so duplicates both stay. A noise floor makes the information of deterministic outputs finite. Groups
    whose consumers could not be observed are scored by magnitude.
    """

    def rank(readers: list[Reader]) -> list[Ranking]:
        problems = [
            SequentialSelection(r.covariance, r.weights, r.regressors, noise=config.noise)
            for r in of_one_shape(readers)
        ]

        def choose_(unit: Tensor) -> None:
            for problem in problems:
                problem.choose_(unit)

        if config.joint:
            order, gains = take_greedily(lambda: _gains(problems), choose_, len(readers[0].regressors), greatest=True)
            return rankings_of(cumulative(order.flip(-1), gains.flip(-1)))
        return rankings_of(torch.stack(_gains(problems)).sum(0).nan_to_num(nan=0.0))

    return score_top_down(
        model, structures, moments, rank, scorer=config.kind, is_cumulative=config.joint, keep=config.keep
    )


def _gains(problems: list[SequentialSelection]) -> list[Tensor]:
    return [over_readers(problem.gains()) for problem in problems]
