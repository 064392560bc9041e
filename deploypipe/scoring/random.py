"""Random scores, as the control in comparisons."""

import torch
from torch import nn

from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Random
from deploypipe.records import ScoreTable, Structures


def score_random(model: nn.Module, structures: Structures, moments: Moments, config: Random, seed: int) -> ScoreTable:
    """Score = a uniform random number in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    channels = {g.name: tuple(torch.rand(g.num_units, generator=generator).tolist()) for g in structures.groups}
    return ScoreTable(scorer=config.kind, channels=channels)
