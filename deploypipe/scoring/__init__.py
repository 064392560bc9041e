"""Score units: which units of a group to remove first. One file per method, one line in `SCORERS`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from deploypipe.errors import DataError
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import (
    BatchNormScale,
    ConditionalMi,
    Fpgm,
    LabelMi,
    LayerwiseMi,
    Magnitude,
    Mipp,
    OutputError,
    Random,
    Scorer,
    Taylor,
)
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.batch_norm_scale import score_batch_norm_scale
from deploypipe.scoring.fpgm import score_fpgm
from deploypipe.scoring.magnitude import score_magnitude
from deploypipe.scoring.mutual_information.conditional_mi import score_conditional_mi
from deploypipe.scoring.mutual_information.label_mi import score_label_mi
from deploypipe.scoring.mutual_information.layerwise_mi import score_layerwise_mi
from deploypipe.scoring.mutual_information.mipp import score_mipp
from deploypipe.scoring.output_error import score_output_error
from deploypipe.scoring.random import score_random
from deploypipe.scoring.score_stability import stability
from deploypipe.scoring.taylor import score_taylor

ScoreFunction = Callable[[nn.Module, Structures, Moments, Any, int], ScoreTable]

SCORERS: dict[type[Scorer], ScoreFunction] = {
    Magnitude: score_magnitude,
    Random: score_random,
    BatchNormScale: score_batch_norm_scale,
    Fpgm: score_fpgm,
    Taylor: score_taylor,
    Mipp: score_mipp,
    LayerwiseMi: score_layerwise_mi,
    OutputError: score_output_error,
    LabelMi: score_label_mi,
    ConditionalMi: score_conditional_mi,
}


def score(model: nn.Module, structures: Structures, moments: Moments, scorer: Scorer, *, seed: int = 0) -> ScoreTable:
    """Give every unit of every group one finite score; higher = keep."""
    model = unwrapped(model)
    return SCORERS[type(scorer)](model, structures, moments, scorer, seed)


def score_halves(
    model: nn.Module,
    structures: Structures,
    halves: tuple[Moments, Moments],
    whole: Moments,
    scorer: Scorer,
    *,
    seed: int = 0,
) -> ScoreTable:
    """Score units on all samples, and report how well the scores on two halves agree (see `observe_halves`).

    Stability is left out if half of the samples is too few for the scorer.
    """
    table = score(model, structures, whole, scorer, seed=seed)
    try:
        first, second = (score(model, structures, half, scorer, seed=seed) for half in halves)
    except DataError:
        return table
    return replace(table, stability=stability(first, second))


def needs_derivatives(scorer: Scorer) -> bool:
    """Whether the scorer needs derivatives, so that the calibration pass needs the loss."""
    return isinstance(scorer, Taylor) or (isinstance(scorer, OutputError) and scorer.fisher)
