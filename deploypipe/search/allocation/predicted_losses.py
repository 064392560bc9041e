"""Predict the losses of a group's widths from a few that are measured.

The layers that read a group are repaired by least squares, from moments. The same moments give the error that stays
after the repair, for every width at once. A small error does harm in proportion to its size, because the dense network
is a minimum of the loss; a larger one does more. So `loss = a * error * exp(b * error)`, and two measured widths give a
and b. benchmarks/curves.py shows how close that comes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.numerics.least_squares import regular_cholesky
from deploypipe.observe.layer_regressions import columns, num_inputs, num_taps, weight_matrix
from deploypipe.observe.pass_statistics import InputMoments, Moments
from deploypipe.records import ChannelGroup
from deploypipe.search.allocation.single_cuts import readers_of

_RIDGE = 1e-4  # of the mean variance: inputs that never vary take no part
_SMALLEST = 1e-30
_SECOND = 0.15  # the second width has about this share of the narrowest width's error


def repair_errors(
    modules: Mapping[str, nn.Module], group: ChannelGroup, kept: Sequence[tuple[int, ...]], moments: Moments
) -> list[float] | None:
    """The error that stays after the repair for each choice of units; each choice begins with the one before.

    The variance of the readers' outputs that the kept inputs do not explain, as a share of the variance of all outputs,
    averaged over the readers. None if a reader is not repaired.
    """
    readers = readers_of(group, modules)
    if not readers or not all(name in moments.inputs for name in readers):
        return None
    ranked = [*kept[-1], *sorted(set(range(group.num_units)) - set(kept[-1]))]
    each = [
        _unexplained(modules[name], [units[i] for i in ranked], list(map(len, kept)), moments.inputs[name])
        for name, units in readers.items()
    ]
    return [sum(shares) / len(each) for shares in zip(*each, strict=True)]


def _unexplained(
    layer: Any, units: Sequence[Sequence[int]], widths: Sequence[int], moments: InputMoments
) -> list[float]:
    """The unexplained share of the outputs' variance, for each number of the first units that stay.

    With the inputs in the order in which they stay and S = L L', the covariance of the inputs that go, given those that
    stay, is the last block of L times its transpose. So the columns of W L hold the errors of all widths.
    """
    removable = {i for unit in units for i in unit}
    taps = num_taps(layer)
    order = [i for i in range(num_inputs(layer)) if i not in removable]  # of other groups: they stay in any case
    starts = []
    for unit in units:
        starts.append(len(order) * taps)
        order += unit
    starts.append(len(order) * taps)
    index = torch.tensor(columns(order, taps))
    gram = moments.covariance[index][:, index]
    factor = regular_cholesky(gram, _RIDGE * float(gram.diagonal().mean()))
    weights = weight_matrix(layer).detach().to(gram)[:, index]
    by_column: Tensor = (weights @ factor).square().sum(0)
    tails = torch.cat([by_column.flip(0).cumsum(0).flip(0), by_column.new_zeros(1)])
    whole = float(tails[0])
    return [float(tails[starts[width]]) / whole if whole > 0 else 0.0 for width in widths]


def first_positions(errors: Sequence[float]) -> tuple[int, int]:
    """Which two widths to measure: the narrowest, and one with a moderate error."""
    wanted = np.log(max(_SECOND * errors[0], _SMALLEST))
    return 0, 1 + int(np.argmin(np.abs(np.log(np.maximum(errors[1:], _SMALLEST)) - wanted)))


def predict_losses(errors: Sequence[float], measured: Mapping[int, float]) -> list[float] | None:
    """The losses of all widths from those of two or more, by position.

    `log(loss / error)` is linear in the error between two measured widths, and beyond the outer ones. None if the
    measured losses do not allow it: one is zero, or a smaller error does more harm.
    """
    known = sorted(measured, key=lambda i: errors[i])
    at, losses = np.array([errors[i] for i in known]), np.array([measured[i] for i in known])
    if losses[0] <= 0 or min(errors) < 0 or np.any(np.diff(at) <= 0) or np.any(np.diff(losses) <= 0):
        return None
    logs = np.log(losses / at)
    slopes = np.diff(logs) / np.diff(at)
    segments = np.clip(np.searchsorted(at, errors) - 1, 0, len(slopes) - 1)
    factors = np.exp(logs[segments] + slopes[segments] * (np.array(errors) - at[segments]))
    return [
        measured.get(i, float(error * factor)) for i, (error, factor) in enumerate(zip(errors, factors, strict=True))
    ]
