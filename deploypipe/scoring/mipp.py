"""Mutual-information-preserving pruning in closed Gaussian form (arXiv:2411.00147; derivation in `numerics`).

A unit is a group of regressors (its taps) of every layer that reads it; the score is the information about those
layers' outputs that is lost when it goes, after all units of lower score are already gone.
"""

import heapq
from typing import Any

import torch
from torch import nn

from deploypipe.numerics.gaussian_mi import SequentialRemoval
from deploypipe.observe.moments import Moments
from deploypipe.observe.patches import columns, num_taps, weight_matrix
from deploypipe.recipe import Magnitude, Mipp
from deploypipe.records import ChannelGroup, ScoreTable, Structures
from deploypipe.scoring.magnitude import score_magnitude

UNOBSERVED = "none of its consumers could be observed; scored by magnitude"
_EXACT = 128  # units up to which all losses are computed at every removal: being lazy saves nothing there
_REFRESH = 16  # removals between two computations of all losses in wider groups
_STEP = 1e-9  # keeps the order of removal where nothing is lost


def score_mipp(model: nn.Module, structures: Structures, moments: Moments, config: Mipp, seed: int) -> ScoreTable:
    """Cumulative nats lost when a unit is removed in greedy order: the last one standing has the highest score.

    Groups none of whose consumers could be observed are scored by magnitude.
    """
    modules = dict(model.named_modules())
    by_magnitude = score_magnitude(model, structures, moments, Magnitude(), seed).channels
    orders = {group.name: _removal_order(group, modules, moments, config) for group in structures.groups}
    return ScoreTable(
        scorer=config.kind,
        channels={name: order or by_magnitude[name] for name, order in orders.items()},
        reasons={name: UNOBSERVED for name, order in orders.items() if not order},
    )


def _removal_order(
    group: ChannelGroup, modules: dict[str, nn.Module], moments: Moments, config: Mipp
) -> tuple[float, ...]:
    problems = []
    for member in group.members:
        if member.side == "in" and member.module in moments.inputs:
            layer: Any = modules[member.module]
            regressors = [columns(unit, num_taps(layer)) for unit in member.units]
            covariance = moments.inputs[member.module].covariance
            weights = weight_matrix(layer).detach().double().T.contiguous()
            problems.append(SequentialRemoval(covariance, weights, regressors, noise=config.noise))
    if not problems:
        return ()
    return _greedy(problems, group.num_units)


def _greedy(problems: list[SequentialRemoval], num_units: int) -> tuple[float, ...]:
    """Remove the unit of least loss, again and again; the score is what was lost by then.

    In wide groups only the seemingly smallest loss is computed anew (lazy greedy): losses mostly grow as others go, so
    those of the last refresh are lower bounds. They can shrink, too, where few outputs are read; hence the refresh.
    """
    refresh = 1 if num_units <= _EXACT else _REFRESH
    scores, lost = [0.0] * num_units, 0.0
    remaining = set(range(num_units))
    bounds: list[tuple[float, int]] = []
    for step in range(num_units):
        if step % refresh == 0:
            order = sorted(remaining)
            bounds = list(zip(_losses(problems, order), order, strict=True))
            heapq.heapify(bounds)
        loss, unit = heapq.heappop(bounds)
        while step % refresh and bounds:
            loss = _losses(problems, [unit])[0]
            if loss <= bounds[0][0]:
                break
            loss, unit = heapq.heapreplace(bounds, (loss, unit))
        lost += max(loss, 0.0)
        scores[unit] = lost + step * _STEP
        remaining.remove(unit)
        for problem in problems:
            problem.remove_(unit)
    return tuple(scores)


def _losses(problems: list[SequentialRemoval], units: list[int]) -> list[float]:
    total = torch.stack([problem.losses(units) for problem in problems]).sum(0)
    return [float(x) for x in total.nan_to_num(nan=0.0)]
