"""Distance of a unit's weights from all others (filter pruning via geometric median, arXiv:1811.00250)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploypipe.observe.layer_regressions import writes
from deploypipe.observe.moments import Moments
from deploypipe.recipe import Fpgm
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import completed_by_magnitude, weight_rows

WITHOUT_WEIGHTS = "nothing that produces its units has a weight matrix; scored by magnitude"


def score_fpgm(model: nn.Module, structures: Structures, moments: Moments, config: Fpgm, seed: int) -> ScoreTable:
    """Sum of the Euclidean distances from a unit's weights to every other unit's.

    A unit's weights are those of all its producers, concatenated. Near the geometric median means replaceable by the
    others: the lowest score. O(units^2 * weights of a unit).
    """
    modules = dict(model.named_modules())
    squared = {group.name: _squared_distances(group, modules) for group in structures.groups}
    channels = {name: tuple(each.sqrt().sum(1).tolist()) for name, each in squared.items() if each is not None}
    reasons = {name: WITHOUT_WEIGHTS for name, each in squared.items() if each is None}
    return completed_by_magnitude(model, structures, ScoreTable(scorer=config.kind, channels=channels), reasons)


def _squared_distances(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> Tensor | None:
    """(units, units) float64, summed over producers: that of the concatenated weights, without the copy."""
    total: Tensor | None = None
    for member in group.members:
        rows = weight_rows(modules[member.module], member) if writes(modules[member.module], member.side) else None
        if rows is not None:
            units = rows[torch.tensor(member.units)].flatten(1).double()
            squared = torch.cdist(units, units).square()
            total = squared if total is None else total + squared
    return total
