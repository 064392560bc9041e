"""Layer-wise pruning by mutual information with the kept units above (Fan et al., arXiv:2108.12594), Gaussian form."""

import torch
from torch import nn

from deploypipe.numerics.gaussian_mi import SequentialSelection
from deploypipe.observe.moments import Moments
from deploypipe.recipe import LayerwiseMi
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.top_down import Ranking, Reader, cumulative, score_top_down


def score_layerwise_mi(
    model: nn.Module, structures: Structures, moments: Moments, config: LayerwiseMi, seed: int
) -> ScoreTable:
    """Nats about the kept outputs of all readers, summed over the readers.

    joint: units are chosen one by one, each time the one that adds most to those chosen; the score is what was still
    unknown when a unit was chosen, so the first one has the highest. Otherwise: what each unit tells by itself, so that
    two that tell the same both stay. The information of deterministic outputs is infinite; a noise floor makes it
    finite. Groups none of whose consumers could be observed are scored by magnitude.
    """

    def rank(readers: list[Reader]) -> Ranking:
        problems = [SequentialSelection(r.covariance, r.weights, r.regressors, noise=config.noise) for r in readers]
        if config.joint:
            order, gains = _choose_one_by_one(problems, len(readers[0].regressors))
            return Ranking(scores=cumulative(order[::-1], gains[::-1]))
        return Ranking(scores=tuple(_gains(problems).tolist()))

    return score_top_down(
        model, structures, moments, rank, scorer=config.kind, is_cumulative=config.joint, keep=config.keep
    )


def _choose_one_by_one(problems: list[SequentialSelection], num_units: int) -> tuple[list[int], list[float]]:
    """Choose the unit of greatest gain, again and again: (order, gains when chosen)."""
    order: list[int] = []
    gains: list[float] = []
    chosen = torch.zeros(num_units, dtype=torch.float64)
    for _ in range(num_units):
        now = _gains(problems) - chosen
        unit = int(now.argmax())
        order.append(unit)
        gains.append(max(float(now[unit]), 0.0))
        chosen[unit] = torch.inf
        for problem in problems:
            problem.choose_(unit)
    return order, gains


def _gains(problems: list[SequentialSelection]) -> torch.Tensor:
    return torch.stack([problem.gains() for problem in problems]).sum(0).nan_to_num(nan=0.0)
