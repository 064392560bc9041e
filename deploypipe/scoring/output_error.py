"""Score units by the squared error of their readers' outputs after the best linear repair (see `numerics`).

Units are removed one by one in greedy order.
"""

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.output_error import SequentialErrorRemoval
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import OutputError
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

_MIN_VARIANCE = 1e-6  # share of a layer's mean output variance; smaller variances are not used as divisors


def score_output_error(
    model: nn.Module, structures: Structures, moments: Moments, config: OutputError, seed: int
) -> ScoreTable:
    """Score = share of the readers' weighted output variance lost once a unit is removed, in greedy order.

    The weight of an output is 1 / its variance. Like a batch norm, this makes all outputs count equally, whatever the
    scale of a channel or a reader. With `fisher` the weight is the squared derivative of a sample's loss by the output,
    summed over positions. The error is then the loss it costs, to second order and up to a factor; outputs that do not
    reach the loss have weight zero. Groups whose consumers could not be observed are scored by magnitude.
    """
    if config.fisher and not moments.output_fisher:
        raise DataError(
            "output_error with fisher=true needs labels: return class targets with calib in load_data(), or set "
            "fisher=false"
        )

    def weigh(reader: Reader, variance: Tensor) -> Tensor:
        if not config.fisher:
            smallest = (_MIN_VARIANCE * variance.mean(-1, keepdim=True)).clamp_min(1e-12)
            return 1 / torch.maximum(variance, smallest)
        found = [moments.output_fisher.get(module) for module in reader.modules]
        weights = [
            variance.new_zeros(variance.shape[-1]) if fisher is None else fisher[outputs].double()
            for fisher, outputs in zip(found, reader.outputs, strict=True)
        ]
        return torch.stack(weights).view(variance.shape)

    def rank(observed: list[Reader]) -> list[Ranking]:
        readers = of_one_shape(observed)
        variances = [((reader.covariance @ reader.weights) * reader.weights).sum(-2) for reader in readers]  # (r, b, m)
        weights = [weigh(reader, variance) for reader, variance in zip(readers, variances, strict=True)]
        products = [(w * v).sum(-1, keepdim=True).sum(0) for w, v in zip(weights, variances, strict=True)]
        total = torch.stack(products).sum(0)  # (b, 1)
        problems = [
            SequentialErrorRemoval(
                r.covariance, r.weights, r.regressors, output_weights=w / total.where(total != 0, 1.0)
            )
            for r, w in zip(readers, weights, strict=True)
        ]
        return rankings_of(cumulative(*remove_greedily(problems, len(readers[0].regressors))))

    return score_top_down(model, structures, moments, rank, scorer=config.kind, is_cumulative=True)
