"""Score units by the distance of their weights from all others (geometric median, arXiv:1811.00250)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploypipe.observe.layer_regressions import writes
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Fpgm
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude, weight_rows

WITHOUT_WEIGHTS = "nothing that produces its units has a weight matrix; scored by magnitude"


def score_fpgm(model: nn.Module, structures: Structures, moments: Moments, config: Fpgm, seed: int) -> ScoreTable:
    """Score = sum of the Euclidean distances from a unit's weights to those of every other unit.

    A unit's weights are those of all its producers, concatenated. A unit near the geometric median has the lowest
    score, because the others can replace it. O(units^2 * weights of a unit).
    """
    modules = dict(model.named_modules())
    squared = {group.name: _squared_distances(group, modules) for group in structures.groups}
    channels = {name: tuple(each.sqrt().sum(1).tolist()) for name, each in squared.items() if each is not None}
    reasons = {name: WITHOUT_WEIGHTS for name, each in squared.items() if each is None}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)


def _squared_distances(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> Tensor | None:
    """(units, units) float64, summed over producers: equal to that of the concatenated weights."""
    total: Tensor | None = None
    for member in group.members:
        rows = weight_rows(modules[member.module], member) if writes(modules[member.module], member.side) else None
        if rows is not None:
            units = rows[torch.tensor(member.units)].flatten(1).double()
            squared = torch.cdist(units, units).square()
            total = squared if total is None else total + squared
    return total
