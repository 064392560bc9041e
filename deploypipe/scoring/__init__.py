"""Which units of a group go first. One file a method, one line in `SCORERS`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from deploypipe.observe.moments import Moments
from deploypipe.recipe import Magnitude, Mipp, Random, Scorer
from deploypipe.records import ScoreTable, Structures
from deploypipe.scoring.magnitude import score_magnitude
from deploypipe.scoring.mipp import score_mipp
from deploypipe.scoring.random import score_random

ScoreFunction = Callable[[nn.Module, Structures, Moments, Any, int], ScoreTable]

SCORERS: dict[type[Scorer], ScoreFunction] = {
    Magnitude: score_magnitude,
    Random: score_random,
    Mipp: score_mipp,
}


def score(model: nn.Module, structures: Structures, moments: Moments, scorer: Scorer, *, seed: int = 0) -> ScoreTable:
    """One finite score for every unit of every group; higher = keep."""
    return SCORERS[type(scorer)](model, structures, moments, scorer, seed)
