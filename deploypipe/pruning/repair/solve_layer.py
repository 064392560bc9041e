"""Solve the weights of one layer by least squares, on rows from all batches that have paused at it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploypipe.errors import DataError
from deploypipe.numerics.least_squares import CrossMoments
from deploypipe.observe.layer_regressions import (
    LinearLike,
    from_blocks,
    num_groups,
    sample_inputs,
    sample_outputs,
    weight_blocks,
)
from deploypipe.pruning.repair.affine_paths import PathEnd
from deploypipe.records import RepairRow

_NEGLIGIBLE = 1e-7  # relative squared error that float32 rounding alone can cause
MAX_COLUMNS = 1024  # of groups of a convolution that are sampled together; their patches are held in memory


def solve_layer_(
    ends: Sequence[PathEnd],
    layer: LinearLike,
    norm: Any,
    places: Sequence[Tensor],
    target: Tensor,
    ridge: float,
    *,
    in_place: bool = False,
) -> tuple[RepairRow, list[Tensor]]:
    """Regress `target` (rows, outputs) on what the layer reads, write the solution, and keep it if it is better.

    ends: one per batch, with the positions of its rows in `places`. The regression has an intercept if a bias or a
    batch norm can store it. Errors are relative to the target's variance, and measured at the ends of the paths with
    the old and with the new weights. Returns the values to continue with; in_place: they overwrite those at the ends,
    one batch after the other, so that old and new ones are never held together.
    """
    name = ends[0].path.layer
    centred = target - target.mean(0, dtype=torch.float64).to(target.dtype)
    variance = float(centred.square_().mean(0, dtype=torch.float64).sum().clamp_min(1e-30))
    del centred

    def error(difference: Tensor) -> float:
        return float(difference.square_().sum(dtype=torch.float64)) / len(target) / variance

    values = [end.value for end in ends]
    apart = target.clone()
    for start, end, at in _rows_of(ends, places):
        apart[start : start + at.numel()] -= sample_outputs(layer, end.value, at)
    before = error(apart)
    if before < _NEGLIGIBLE:
        return RepairRow(module=name, error_before=before, error_after=before, reason="nothing to repair"), values
    solution = _regress(ends, layer, norm, places, target, ridge)
    written = [t for m in (layer, norm) if m is not None for t in (*m.parameters(False), *m.buffers(False))]
    old = [tensor.detach().clone() for tensor in written]
    if norm is not None:
        _write_before_norm_(layer, norm, solution)
    else:
        layer.weight.copy_(_as_weight(layer, solution.weights))
        if layer.bias is not None:
            layer.bias.copy_(solution.intercept)
    outputs = []
    apart.copy_(target)
    for start, end, at in _rows_of(ends, places):
        output = _output_of(layer, norm, end)
        apart[start : start + at.numel()] -= sample_outputs(layer, output, at)
        outputs.append(end.value.copy_(output) if in_place else output)
    after = error(apart)
    if after < before:
        return RepairRow(module=name, error_before=before, error_after=after), outputs
    for tensor, value in zip(written, old, strict=True):
        tensor.copy_(value)
    for end in ends if in_place else ():
        end.value.copy_(_output_of(layer, norm, end))
    return RepairRow(module=name, error_before=before, error_after=before, reason="no solution lowers it"), values


def _rows_of(ends: Sequence[PathEnd], places: Sequence[Tensor]) -> Iterator[tuple[int, PathEnd, Tensor]]:
    """Each batch's first row among all rows, its end, and the positions of its rows."""
    start = 0
    for end, at in zip(ends, places, strict=True):
        yield start, end, at
        start += at.numel()


def _output_of(layer: LinearLike, norm: Any, end: PathEnd) -> Tensor:
    """What the layer gives at the end of its path with the weights that it has now."""
    output: Tensor = layer.forward(*end.args)
    return output if norm is None else norm.forward(output)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Solution:
    """weights (outputs, inputs / groups * taps), intercept (outputs,), and the moments of the weights' products."""

    weights: Tensor
    intercept: Tensor
    product_mean: Tensor
    product_variance: Tensor


def _regress(
    ends: Sequence[PathEnd], layer: LinearLike, norm: Any, places: Sequence[Tensor], target: Tensor, ridge: float
) -> _Solution:
    """One regression per group of a convolution, shrunk towards the current weights."""
    blocks, groups = weight_blocks(layer).double(), num_groups(layer)  # (groups, outputs, inputs * taps)
    scale = _output_scale(norm)
    prior = blocks.mT if scale is None else blocks.mT * scale.view(groups, 1, -1)
    targets = target.view(len(target), groups, -1).movedim(1, 0)  # (groups, rows, outputs)
    has_intercept = norm is not None or layer.bias is not None
    step = max(1, MAX_COLUMNS // blocks.shape[2])
    fits = []
    for start in range(0, groups, step):
        part = slice(start, start + step)
        patches = _patches(ends, layer, part, places)
        regressors = patches.view(len(patches), -1, blocks.shape[2]).movedim(1, 0)  # (groups, rows, inputs * taps)
        moments = CrossMoments.of(regressors, targets[part], overwrite=True)
        if not moments.is_finite:
            raise DataError(
                f"{ends[0].path.layer}: activations are not finite on the calibration samples; "
                "check the data and the model"
            )
        fits.append(moments.fit(prior[part], ridge, has_intercept=has_intercept))
    return _Solution(
        weights=torch.cat([fit.coefficients.mT.flatten(0, 1) for fit in fits]),
        intercept=torch.cat([fit.intercept.flatten() for fit in fits]),
        product_mean=torch.cat([fit.product_mean.flatten() for fit in fits]),
        product_variance=torch.cat([fit.product_variance.flatten() for fit in fits]),
    )


def _patches(ends: Sequence[PathEnd], layer: LinearLike, part: slice, places: Sequence[Tensor]) -> Tensor:
    """What the groups `part` read at all positions: (rows, channels * taps)."""
    read = [_inputs_of(layer, end.args[0], part) for end in ends]
    if len(ends) == 1:
        return sample_inputs(layer, read[0], ends[0].value, places[0])
    rows: Tensor | None = None
    for (start, end, at), inputs in zip(_rows_of(ends, places), read, strict=True):
        found = sample_inputs(layer, inputs, end.value, at)
        if rows is None:
            rows = found.new_empty(sum(each.numel() for each in places), found.shape[1])
        rows[start : start + len(found)] = found
    assert rows is not None
    return rows


def _inputs_of(layer: LinearLike, inputs: Tensor, part: slice) -> Tensor:
    """The input channels that the groups `part` of a convolution read."""
    groups = num_groups(layer)
    if groups == 1:
        return inputs
    width = inputs.shape[1] // groups
    return inputs[:, part.start * width : part.stop * width]


def _output_scale(norm: Any) -> Tensor | None:
    if norm is None:
        return None
    gain = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
    scale: Tensor = gain.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.detach()


def _as_weight(layer: LinearLike, rows: Tensor) -> Tensor:
    """Rows (outputs, inputs / groups * taps) as a tensor shaped like the layer's weight."""
    return from_blocks(layer, rows.view(num_groups(layer), -1, rows.shape[1]))


def _write_before_norm_(layer: LinearLike, norm: Any, solution: _Solution) -> None:
    """Write the solution, its scale and its intercept in the batch norm.

    The norm gets the true statistics of `layer(x)`, so that the network computes the same with batch statistics
    (training) as with running ones. The weights of each output keep their old length: before a batch norm this length
    changes only the size of a training step (van Laarhoven, arXiv:1706.05350). The solution's own lengths contain the
    gain of the norm. On ResNet-56 they are 0.007 to 18 times the old ones, and a fine-tune with them lost the repair.
    """
    solved = solution.weights
    length, solved_length = weight_blocks(layer).double().flatten(0, 1).norm(dim=1), solved.norm(dim=1)
    scale = torch.where((length > 0) & (solved_length > 0), length / solved_length, 1.0)
    layer.weight.copy_(_as_weight(layer, solved * scale[:, None]))
    if layer.bias is not None:
        layer.bias.zero_()
    variance = solution.product_variance * scale.square()
    norm.running_mean.copy_(solution.product_mean * scale)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt() / scale)
    norm.bias.copy_(solution.product_mean + solution.intercept)
