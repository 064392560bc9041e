"""Squared error of the readers' outputs after the best linear repair, units removed one by one (derivation in
`numerics`)."""

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.numerics.output_error import SequentialErrorRemoval
from deploypipe.observe.moments import Moments
from deploypipe.recipe import OutputError
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.mutual_information.top_down_mi import (
    Ranking,
    Reader,
    cumulative,
    rankings_of,
    remove_one_by_one,
    score_top_down,
)

_STILL = 1e-6  # share of a layer's mean output variance below which a variance is not trusted to divide by


def score_output_error(
    model: nn.Module, structures: Structures, moments: Moments, config: OutputError, seed: int
) -> ScoreTable:
    """Share of the readers' weighted output variance that is lost by the time a unit goes, in greedy order.

    An output weighs 1 / its variance: as a batch norm behind it does, that makes all outputs count alike, whatever the
    scale of a channel or a reader. With `fisher` it weighs the squared derivative of a sample's loss by it, summed over
    positions, which makes the error the loss it costs, to second order and up to a factor; outputs that the loss does
    not reach weigh nothing. Groups none of whose consumers could be observed are scored by magnitude.
    """
    if config.fisher and not moments.output_fisher:
        raise DataError(
            "output_error with fisher=true needs labels: return class targets with calib in load_data(), or set "
            "fisher=false"
        )

    def weigh(reader: Reader, variance: Tensor) -> Tensor:
        if not config.fisher:
            least = (_STILL * variance.mean(-1, keepdim=True)).clamp_min(1e-12)
            return 1 / torch.maximum(variance, least)
        found = [moments.output_fisher.get(module) for module in reader.modules]
        return torch.stack(
            [
                torch.zeros_like(variance[0]) if fisher is None else fisher[outputs].double()
                for fisher, outputs in zip(found, reader.outputs, strict=True)
            ]
        )

    def rank(readers: list[Reader]) -> list[Ranking]:
        variances = [((reader.covariance @ reader.weights) * reader.weights).sum(1) for reader in readers]  # (b, m)
        weights = [weigh(reader, variance) for reader, variance in zip(readers, variances, strict=True)]
        products = [(w * v).sum(1, keepdim=True) for w, v in zip(weights, variances, strict=True)]
        total = torch.stack(products).sum(0)  # (b, 1)
        problems = [
            SequentialErrorRemoval(
                r.covariance, r.weights, r.regressors, output_weights=w / total.where(total != 0, 1.0)
            )
            for r, w in zip(readers, weights, strict=True)
        ]
        return rankings_of(cumulative(*remove_one_by_one(problems, len(readers[0].regressors))))

    return score_top_down(model, structures, moments, rank, scorer=config.kind, is_cumulative=True)
