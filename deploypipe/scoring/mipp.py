"""Mutual-information-preserving pruning in closed Gaussian form (arXiv:2411.00147; derivation in `numerics`).

A unit is a group of regressors (its taps) of every layer that reads it; the score is the information about those
layers' outputs that is lost when it goes, after all units of lower score are already gone.
"""

import torch
from torch import nn

from deploypipe.numerics.gaussian_mi import SequentialRemoval
from deploypipe.observe.moments import Moments
from deploypipe.observe.patches import columns, num_taps, weight_matrix
from deploypipe.recipe import Mipp
from deploypipe.records import ChannelGroup, Structures
from deploypipe.scoring.magnitude import score_magnitude


def score_mipp(
    model: nn.Module, structures: Structures, moments: Moments, config: Mipp, seed: int
) -> dict[str, tuple[float, ...]]:
    """Cumulative nats lost when a unit is removed in greedy order: the last one standing has the highest score.

    Groups none of whose consumers could be observed are scored by magnitude.
    """
    modules = dict(model.named_modules())
    by_magnitude = score_magnitude(model, structures, moments, config, seed)  # type: ignore[arg-type]
    return {
        group.name: _removal_order(group, modules, moments, config) or by_magnitude[group.name]
        for group in structures.groups
    }


def _removal_order(
    group: ChannelGroup, modules: dict[str, nn.Module], moments: Moments, config: Mipp
) -> tuple[float, ...]:
    problems = []
    for member in group.members:
        if member.side == "in" and member.module in moments.inputs:
            layer = modules[member.module]
            regressors = [columns(unit, num_taps(layer)) for unit in member.units]
            covariance = moments.inputs[member.module].covariance
            weights = weight_matrix(layer).detach().double().T.contiguous()
            problems.append(SequentialRemoval(covariance, weights, regressors, noise=config.noise))
    if not problems:
        return ()
    scores = torch.zeros(group.num_units, dtype=torch.float64)
    gone = torch.zeros(group.num_units, dtype=torch.bool)
    lost = 0.0
    for step in range(group.num_units):
        losses = torch.stack([problem.losses() for problem in problems]).sum(0).nan_to_num(nan=0.0)
        losses[gone] = torch.inf
        unit = int(losses.argmin())
        lost += max(float(losses[unit]), 0.0)
        scores[unit] = lost + step * 1e-9  # keeps the order where nothing is lost
        gone[unit] = True
        for problem in problems:
            problem.remove_(unit)
    return tuple(scores.tolist())
