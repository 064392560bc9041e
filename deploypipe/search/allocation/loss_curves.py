"""Measure loss curves: how much cutting one structure alone changes the network's outputs.

Allocation by summed scores is worse than uniform widths; allocation by the measured change of the outputs is far
better. Scores decide which units of a group are removed, these curves decide how many.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from deploypipe.compute_device import CPU
from deploypipe.distillation_loss import kl_divergence_loss
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Search
from deploypipe.records import Curves, LossCurve, Notify, Progress, ScoreTable, Structures, silent
from deploypipe.search.allocation.cut_losses import CutLosses
from deploypipe.search.allocation.single_cuts import BlockPoint, GroupPoint, Point
from deploypipe.task import Batch, DistillationLoss, num_samples, stack_alike, take_calib

# On images that a network has memorised its outputs are saturated: the KL at temperature 1 depends on a few of them.
# At a higher temperature every image contributes: better widths from the same number of images (pipelines/LOG.md).
TEMPERATURE = 4.0


def measure_curves(
    dense: nn.Module,
    structures: Structures,
    scores: ScoreTable,
    moments: Moments,
    batches: Sequence[Batch],
    settings: Search,
    *,
    channel_multiple: int = 1,
    distillation_loss: DistillationLoss | None = None,
    device: torch.device = CPU,
    notify: Notify = silent,
) -> Curves:
    """Measure how far the outputs move with each group at several widths, and without each block.

    The distance is `distillation_loss` at `TEMPERATURE`; if None, the KL divergence of classes, in nats per sample.

    The cut is simulated on copies of the dense network: removed inputs of the consumers are set to zero, which is what
    surgery does, and the consumers' weights are repaired in closed form from `moments`. Cost: one forward pass for each
    point, from the first layer that differs. On a CPU, `torch.get_num_threads()` pieces of the samples run at once.
    """
    taken = take_calib(batches, settings.num_curve_samples)
    alike = stack_alike([batch for batch, _ in taken])
    measured = CutLosses(dense, alike, moments, distillation_loss or kl_divergence_loss(), TEMPERATURE, device)
    offered = unmeasured_curves(structures, settings, channel_multiple).curves
    points = [(curve, width, point) for curve in offered for width, point in _points(curve, structures, scores)]

    def report(done: int, total: int) -> None:
        notify(Progress(stage="curves", done=done, total=total, message=f"{len(points)} cuts"))

    losses = measured.measure([point for *_, point in points], report)
    found = {(curve.name, curve.kind, width): loss for (curve, width, _), loss in zip(points, losses, strict=True)}
    curves = [
        replace(curve, losses=tuple(found.get((curve.name, curve.kind, width), 0.0) for width in curve.kept))
        for curve in offered
    ]
    return Curves(curves=tuple(curves), num_samples=sum(map(num_samples, alike)))


def _points(curve: LossCurve, structures: Structures, scores: ScoreTable) -> list[tuple[int, Point]]:
    """The cuts of a curve, by width; the dense width needs none."""
    if curve.kind == "block":
        return [(0, BlockPoint(block=next(block for block in structures.blocks if block.name == curve.name)))]
    group = next(group for group in structures.groups if group.name == curve.name)
    ranked = sorted(range(group.num_units), key=lambda i: (-scores.channels[group.name][i], i))
    return [(w, GroupPoint(group=group, kept=tuple(ranked[:w]))) for w in curve.kept if w < group.num_units]


def unmeasured_curves(structures: Structures, settings: Search, channel_multiple: int) -> Curves:
    """The curves of `measure_curves` with losses of 0: the possible choices are known before calibration."""
    curves = []
    for group in structures.groups:
        least, step = structures.least_width(group, channel_multiple), group.step(channel_multiple)
        kept = (*width_levels(group.num_units, settings.num_levels, step, least), group.num_units)
        curves.append(LossCurve(name=group.name, kind="channels", kept=kept, losses=(0.0,) * len(kept)))
    if settings.prune_blocks:
        curves += [LossCurve(name=block.name, kind="block", kept=(0,), losses=(0.0,)) for block in structures.blocks]
    return Curves(curves=tuple(curves), num_samples=0)


def width_levels(num_units: int, count: int, multiple: int, least: int = 1) -> list[int]:
    """At most `count` widths from `least` to below `num_units`, evenly spread multiples of `multiple`, ascending."""
    steps = list(range(-(-least // multiple) * multiple, num_units, multiple))
    if len(steps) <= count:
        return steps
    return sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
