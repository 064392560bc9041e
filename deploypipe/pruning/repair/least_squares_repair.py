"""Repair a pruned network layer by layer with least squares: no gradients, one forward pass.

The pruned network runs over the calibration samples. When a layer has computed its output, its weights are solved: on
the inputs it really gets in the pruned network, it should give the dense network's output. Then the pass continues with
the corrected output. If the output is added to a shortcut, the target is the dense sum minus the pruned shortcut. So
errors of the shortcut are corrected too and do not grow with depth. If removed blocks follow, the target is the output
of those blocks (`removed_block_targets`).

`observe.layer_regressions.KINDS` lists the layers that are solved; `affine_paths` finds where outputs are compared.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deploypipe.compute_device import exact_float32, to_device
from deploypipe.memory_order import find_order
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.repair.affine_paths import SignalPath, common_paths, find_paths, layers_without_path
from deploypipe.pruning.repair.fit_to_memory import samples_together
from deploypipe.pruning.repair.removed_block_targets import layers_before_removed_blocks
from deploypipe.pruning.repair.repair_passes import RepairWork, cut_in_pieces, real_tokens_of
from deploypipe.recipe import Repair
from deploypipe.records import (
    Notify,
    Progress,
    PruningPlan,
    RepairFit,
    RepairReport,
    RepairRow,
    RepairSegment,
    silent,
)
from deploypipe.task import Batch, RealTokens, num_samples, stack_alike, take_calib


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
    fit: RepairFit | None = None,
    device: torch.device | None = None,
) -> tuple[nn.Module, RepairReport]:
    """Repair a copy of `pruned`: solve its weights layer by layer to reproduce the dense network's outputs.

    Cost: two forward passes over at most `settings.num_samples` samples (held in memory at once) and one solve per
    layer. Every layer after the first change is solved, even if it was not cut, because it corrects wrong inputs. A
    solution that does not lower the layer's error is discarded. Batches may differ in length or size; labels are not
    used.

    arriving: what the pruned network reads instead of `batches`, sample by sample, if both networks follow layers that
    were pruned before. real_tokens: as `Task.real_tokens`; padding does not count. The report first lists the layers
    that cannot be solved.
    fit: from `fit_repair`, if all samples at once are too much for the memory; each segment costs two passes up to its
    last layer. device: where it computes; None: where the networks and batches are. The result is where `pruned` is.
    """
    dense, pruned = unwrapped(dense), unwrapped(pruned)
    taken = take_calib(batches, settings.num_samples)
    came = None if arriving is None else take_calib(arriving, settings.num_samples)
    num_taken = sum(num_samples(inputs) for inputs, _ in taken)
    repaired = copy.deepcopy(pruned).eval()
    if not plan.blocks and not plan.edits:
        return _as_before(repaired, pruned), RepairReport(rows=(), num_samples=num_taken)
    home = next((parameter.device for parameter in pruned.parameters()), None)
    teacher = copy.deepcopy(dense).eval()
    if device is not None:
        repaired, teacher = repaired.to(device), teacher.to(device)
    few = to_device(stack_alike([batch for batch, _ in take_calib(taken, 2)])[0], device)
    with exact_float32(device):
        work = _prepare(teacher, repaired, plan, few, settings, seed, device)
        reasons = len(work.rows)

        def report(layer: str) -> None:
            done = len(work.rows) - reasons
            notify(Progress(stage="repair", done=done, total=len(work.paths), message=layer))

        for segment in _segments(fit, settings, work.paths):
            size = fit.batch_size if fit and fit.segments else samples_together(num_taken, device or home)
            pieces = cut_in_pieces(taken, segment, size)
            arrived = pieces if came is None else cut_in_pieces(came, segment, size)
            real = [real_tokens_of(piece, real_tokens) for piece in pieces]
            work.run_(segment, pieces, arrived, real, report)
    if home is not None:
        repaired = repaired.to(home)
    return _as_before(repaired, pruned), RepairReport(rows=tuple(work.rows), num_samples=num_taken)


def _segments(fit: RepairFit | None, settings: Repair, paths: Mapping[str, SignalPath]) -> Sequence[RepairSegment]:
    """The layers of each pass. A layer that the fit does not know is solved in its last pass."""
    if fit is None or not fit.segments:
        return (
            RepairSegment(
                layers=tuple(paths),
                num_samples=settings.num_samples,
                positions_per_sample=settings.positions_per_sample,
            ),
        )
    known = {layer for segment in fit.segments for layer in segment.layers}
    *first, last = fit.segments
    return (*first, replace(last, layers=(*last.layers, *(layer for layer in paths if layer not in known))))


def _as_before(repaired: nn.Module, pruned: nn.Module) -> nn.Module:
    """Restore the training flags of `pruned`."""
    for module, original in zip(repaired.modules(), pruned.modules(), strict=True):
        module.training = original.training
    return repaired


def _prepare(
    teacher: nn.Module,
    repaired: nn.Module,
    plan: PruningPlan,
    few: Any,
    settings: Repair,
    seed: int,
    device: torch.device | None,
) -> RepairWork:
    """Find the layers to solve, and where the dense network gives what they should. few: a few samples."""
    own = find_paths(teacher, few)
    found = common_paths(find_paths(repaired, few), own)
    paths = {name: path for name, path in found.items() if not path.why_not}
    reasons = {name: path.why_not for name, path in found.items() if path.why_not} | layers_without_path(repaired)
    solvable = {name: path for name, path in own.items() if not path.why_not} | paths
    next_layers = layers_before_removed_blocks(teacher, solvable, plan.blocks, few) if plan.blocks else {}
    return RepairWork(
        teacher=teacher,
        repaired=repaired,
        paths=paths,
        dense_ends={layer: solvable[next_layers.get(layer, layer)] for layer in paths},
        plan=plan,
        ridge=settings.ridge,
        seed=seed,
        arrange=find_order(teacher, few),
        device=device,
        rows=[RepairRow(module=name, reason=reason) for name, reason in reasons.items()],
    )
