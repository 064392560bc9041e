"""Repair a pruned network layer by layer with least squares: no gradients, one forward pass.

The pruned network runs over the calibration samples. When a layer has computed its output, its weights are solved: on
the inputs it really gets in the pruned network, it should give the dense network's output. Then the pass continues with
the corrected output. If the output is added to a shortcut, the target is the dense sum minus the pruned shortcut. So
errors of the shortcut are corrected too and do not grow with depth. If removed blocks follow, the target is the output
of those blocks (`removed_block_targets`).

`observe.layer_regressions.KINDS` lists the layers that are solved; `affine_paths` finds where outputs are compared.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.errors import DataError
from deploypipe.memory_order import find_order
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.numerics.least_squares import CrossMoments
from deploypipe.observe.layer_regressions import (
    LinearLike,
    from_blocks,
    num_groups,
    sample_inputs,
    sample_outputs,
    sample_positions,
    weight_blocks,
    writes,
)
from deploypipe.pruning.repair.affine_paths import (
    PathEnd,
    SignalPath,
    common_paths,
    find_paths,
    hook_path_ends,
    layers_without_path,
)
from deploypipe.pruning.repair.batches_in_lockstep import run_in_lockstep
from deploypipe.pruning.repair.removed_block_targets import layers_before_removed_blocks
from deploypipe.recipe import Repair
from deploypipe.records import Notify, Progress, PruningPlan, RepairReport, RepairRow, silent
from deploypipe.task import (
    Batch,
    RealTokens,
    find_real_tokens,
    forward,
    num_samples,
    stack_alike,
    take_calib,
)

_NEGLIGIBLE = 1e-7  # relative squared error that float32 rounding alone can cause
_MAX_COLUMNS = 1024  # of groups of a convolution that are sampled together; their patches are held in memory


def repair(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Sequence[Batch],
    settings: Repair,
    *,
    arriving: Sequence[Batch] | None = None,
    real_tokens: RealTokens | None = None,
    seed: int = 0,
    notify: Notify = silent,
) -> tuple[nn.Module, RepairReport]:
    """Repair a copy of `pruned`: solve its weights layer by layer to reproduce the dense network's outputs.

    Cost: two forward passes over at most `settings.num_samples` samples (held in memory at once) and one solve per
    layer. Every layer after the first change is solved, even if it was not cut, because it corrects wrong inputs. A
    solution that does not lower the layer's error is discarded. Batches may differ in length or size; labels are not
    used.

    arriving: what the pruned network reads instead of `batches`, sample by sample, if both networks follow layers that
    were pruned before. real_tokens: as `Task.real_tokens`; padding does not count. The report first lists the layers
    that cannot be solved.
    """
    dense, pruned = unwrapped(dense), unwrapped(pruned)
    taken = take_calib(batches, settings.num_samples)
    groups = stack_alike([batch for batch, _ in taken])
    num_taken = sum(map(num_samples, groups))
    repaired = copy.deepcopy(pruned).eval()
    if not plan.blocks and not plan.edits:
        return _as_before(repaired, pruned), RepairReport(rows=(), num_samples=num_taken)
    teacher = copy.deepcopy(dense).eval()
    few = stack_alike([batch for batch, _ in take_calib(taken, 2)])[0]
    own = find_paths(teacher, few)
    found = common_paths(find_paths(repaired, few), own)
    paths = {name: path for name, path in found.items() if not path.why_not}
    reasons = {name: path.why_not for name, path in found.items() if path.why_not} | layers_without_path(repaired)
    rows = [RepairRow(module=name, reason=reason) for name, reason in reasons.items()]
    real = [find_real_tokens(group, real_tokens) for group in groups]
    sampler = _Sampler(settings.positions_per_sample, seed, teacher, real)
    solvable = {name: path for name, path in own.items() if not path.why_not} | paths
    next_layers = layers_before_removed_blocks(teacher, solvable, plan.blocks, few) if plan.blocks else {}
    layers_at = {name: name for name in paths if name not in next_layers}
    layers_at |= {last: layer for layer, last in next_layers.items() if layer in paths}
    arrange = find_order(teacher, few)
    ends_of = {name: solvable[name] for name in layers_at}
    targets = _dense_targets(teacher, ends_of, layers_at, sampler, plan, list(map(arrange, groups)))
    modules = dict(repaired.named_modules())

    def solve(ends: Sequence[PathEnd]) -> list[Tensor]:
        path = ends[0].path
        layer, norm = modules[path.layer], modules[path.norm] if path.norm else None
        places = [sampler.positions(path.layer, layer, end.value, number) for number, end in enumerate(ends)]
        wanted = targets.pop(path.layer)
        for number, end in enumerate(ends):
            if end.other is not None:
                others = sample_outputs(layer, end.other.expand_as(end.value), places[number])
                wanted[number] = wanted[number] - others
        row, outputs = _solve_layer_(ends, layer, norm, places, torch.cat(wanted), settings.ridge)
        rows.append(row)
        notify(Progress(stage="repair", done=len(rows) - len(reasons), total=len(paths), message=path.layer))
        return outputs

    if arriving is not None:
        groups = stack_alike([batch for batch, _ in take_calib(arriving, settings.num_samples)])
    run_in_lockstep(repaired, paths, solve, list(map(arrange, groups)))
    return _as_before(repaired, pruned), RepairReport(rows=tuple(rows), num_samples=num_taken)


def _as_before(repaired: nn.Module, pruned: nn.Module) -> nn.Module:
    """Restore the training flags of `pruned`."""
    for module, original in zip(repaired.modules(), pruned.modules(), strict=True):
        module.training = original.training
    return repaired


class _Sampler:
    """Draw the same output positions of a layer in the dense and in the pruned network."""

    def __init__(self, count: int, seed: int, model: nn.Module, real: Sequence[Tensor | None]) -> None:
        self.count, self.seed, self.real = count, seed, real
        self.order = {name: number for number, (name, _) in enumerate(model.named_modules())}

    def positions(self, name: str, layer: LinearLike, output: Tensor, group: int) -> Tensor:
        """The positions for the samples of one group of batches."""
        seed = self.seed * 100_003 + self.order[name] + group * 10_000_019
        return sample_positions(layer, output, self.count, torch.Generator().manual_seed(seed), self.real[group])


def _dense_targets(
    teacher: nn.Module,
    paths: dict[str, SignalPath],
    layers_at: dict[str, str],
    sampler: _Sampler,
    plan: PruningPlan,
    groups: Sequence[Any],
) -> dict[str, list[Tensor]]:
    """The dense network's values at the ends of paths: layer to repair -> (rows, kept outputs) per group of batches.

    layers_at: layer whose path ends there -> layer to repair; they differ if the blocks between them are removed.
    """
    modules = dict(teacher.named_modules())
    targets: dict[str, list[Tensor]] = {}
    removed: dict[str, set[int]] = {}
    for edit in plan.edits:
        if edit.module in modules and writes(modules[edit.module], edit.side):
            removed.setdefault(edit.module, set()).update(edit.removed)

    def record(end: PathEnd) -> Tensor:
        name = layers_at[end.path.layer]
        layer = modules[name]
        seen = targets.setdefault(name, [])
        total = end.value if end.other is None else end.value + end.other
        rows = sample_outputs(layer, total, sampler.positions(name, layer, end.value, len(seen)))
        kept = [i for i in range(rows.shape[1]) if i not in removed.get(name, set())]
        seen.append(rows[:, kept])
        return end.value

    with torch.no_grad(), hook_path_ends(teacher, paths, record):
        for inputs in groups:
            forward(teacher, inputs)
    return targets


def _solve_layer_(
    ends: Sequence[PathEnd], layer: LinearLike, norm: Any, places: Sequence[Tensor], target: Tensor, ridge: float
) -> tuple[RepairRow, list[Tensor]]:
    """Regress `target` (rows, outputs) on what the layer reads, write the solution, and keep it if it is better.

    ends: one per group of batches, with the positions of its rows in `places`. The regression has an intercept if a
    bias or a batch norm can store it. Errors are relative to the target's variance, and measured at the ends of the
    paths with the old and with the new weights.
    """
    name = ends[0].path.layer
    centred = target - target.mean(0, dtype=torch.float64).to(target.dtype)
    variance = float(centred.square().mean(0, dtype=torch.float64).sum().clamp_min(1e-30))

    def error(values: Sequence[Tensor]) -> float:
        sampled = [sample_outputs(layer, value, at) for value, at in zip(values, places, strict=True)]
        difference = target - torch.cat(sampled)
        return float(difference.square().sum(dtype=torch.float64)) / len(target) / variance

    old_values = [end.value for end in ends]
    before = error(old_values)
    if before < _NEGLIGIBLE:
        return RepairRow(module=name, error_before=before, error_after=before, reason="nothing to repair"), old_values
    solution = _regress(ends, layer, norm, places, target, ridge)
    written = [t for m in (layer, norm) if m is not None for t in (*m.parameters(False), *m.buffers(False))]
    old = [tensor.detach().clone() for tensor in written]
    if norm is not None:
        _write_before_norm_(layer, norm, solution)
    else:
        layer.weight.copy_(_as_weight(layer, solution.weights))
        if layer.bias is not None:
            layer.bias.copy_(solution.intercept)
    outputs: list[Tensor] = [layer.forward(*end.args) for end in ends]
    if norm is not None:
        outputs = [norm.forward(output) for output in outputs]
    after = error(outputs)
    if after < before:
        return RepairRow(module=name, error_before=before, error_after=after), outputs
    for tensor, value in zip(written, old, strict=True):
        tensor.copy_(value)
    return RepairRow(module=name, error_before=before, error_after=before, reason="no solution lowers it"), old_values


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
    step = max(1, _MAX_COLUMNS // blocks.shape[2])
    fits = []
    for start in range(0, groups, step):
        part = slice(start, start + step)
        read = [_inputs_of(layer, end.args[0], part) for end in ends]
        patches = torch.cat(
            [sample_inputs(layer, x, end.value, at) for x, end, at in zip(read, ends, places, strict=True)]
        )
        regressors = patches.view(len(patches), -1, blocks.shape[2]).movedim(1, 0)  # (groups, rows, inputs * taps)
        moments = CrossMoments.of(regressors, targets[part])
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
