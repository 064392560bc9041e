"""Measure loss curves: how much cutting one structure alone changes the network's outputs.

Allocation by summed scores is worse than uniform widths; allocation by the measured change of the outputs is far
better. Scores decide which units of a group are removed, these curves decide how many.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from deploypipe.compute_device import CPU
from deploypipe.distillation_loss import kl_divergence_loss
from deploypipe.observe.pass_statistics import Moments
from deploypipe.recipe import Search
from deploypipe.records import Curves, LossCurve, Notify, Progress, ScoreTable, Structures, silent
from deploypipe.search.allocation.cut_losses import CutLosses
from deploypipe.search.allocation.predicted_losses import first_positions, predict_losses, repair_errors
from deploypipe.search.allocation.single_cuts import BlockPoint, GroupPoint, Point
from deploypipe.task import Batch, DistillationLoss, stack_alike, take_calib

# On images that a network has memorised its outputs are saturated: the KL at temperature 1 depends on a few of them.
# At a higher temperature every image contributes: better widths from the same number of images (pipelines/LOG.md).
TEMPERATURE = 4.0
_FEW_WIDTHS = 3  # nothing is gained by a prediction from two
_PRECISION = 0.15  # relative, of measured losses: about that of predicted ones (benchmarks/curves.py)


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
    measured point, from the first layer that differs. On a CPU, `torch.get_num_threads()` pieces of the samples run at
    once. settings.curves: "predicted" measures two widths of each group whose readers are repaired (`predict_losses`),
    on fewer samples if a quarter or half of them are enough; "measured" measures every point on all samples.
    """
    taken = take_calib(batches, settings.num_curve_samples)
    alike = stack_alike([batch for batch, _ in taken])
    cut_losses = CutLosses(dense, alike, moments, distillation_loss or kl_divergence_loss(), TEMPERATURE, device)
    offered = unmeasured_curves(structures, settings, channel_multiple).curves
    surveys = [_survey(curve, structures, scores) for curve in offered]
    if settings.curves == "predicted":
        modules = dict(dense.named_modules())
        for survey in surveys:
            survey.errors = _errors(survey, modules, moments)
    precision = _PRECISION if settings.curves == "predicted" else 0.0
    events = _Events(notify)
    for choose in (_Survey.first, _Survey.remaining):
        todo = [(survey, position) for survey in surveys for position in choose(survey)]
        if todo:
            points = [survey.points[position] for survey, position in todo]
            losses = cut_losses.measure(points, events.begin(len(points)), precision)
            precision = 0.0  # the samples are chosen
            for (survey, position), loss in zip(todo, losses, strict=True):
                survey.measured[position] = loss
    return Curves(curves=tuple(survey.finished() for survey in surveys), num_samples=cut_losses.num_samples)


@dataclass(slots=True)
class _Events:
    """Reports the passes of several measurements as those of one."""

    notify: Notify
    num_before: int = 0

    def begin(self, num_cuts: int) -> Callable[[int, int], None]:
        before = self.num_before

        def report(done: int, total: int) -> None:
            self.num_before = before + done
            event = Progress(stage="curves", done=before + done, total=before + total, message=f"{num_cuts} cuts")
            self.notify(event)

        return report


@dataclass(slots=True)
class _Survey:
    """A loss curve in the making. Positions count the widths below the dense one, ascending."""

    curve: LossCurve
    points: list[Point]
    errors: list[float] | None = None  # after the repair, at each position; None: all losses are measured
    measured: dict[int, float] = field(default_factory=dict)

    def first(self) -> list[int]:
        """The positions to measure in any case."""
        return list(range(len(self.points))) if self.errors is None else list(first_positions(self.errors))

    def remaining(self) -> list[int]:
        """The positions to measure because they cannot be predicted."""
        if self.errors is not None and predict_losses(self.errors, self.measured) is not None:
            return []
        return [position for position in range(len(self.points)) if position not in self.measured]

    def finished(self) -> LossCurve:
        losses = [self.measured.get(position, 0.0) for position in range(len(self.curve.kept))]
        if len(self.measured) == len(self.points):
            return replace(self.curve, losses=tuple(losses))
        assert self.errors is not None
        predicted = predict_losses(self.errors, self.measured)
        assert predicted is not None
        losses[: len(predicted)] = predicted
        unmeasured = (
            kept for position, kept in enumerate(self.curve.kept[: len(predicted)]) if position not in self.measured
        )
        return replace(self.curve, losses=tuple(losses), predicted=tuple(unmeasured))


def _survey(curve: LossCurve, structures: Structures, scores: ScoreTable) -> _Survey:
    if curve.kind == "block":
        block = next(block for block in structures.blocks if block.name == curve.name)
        return _Survey(curve=curve, points=[BlockPoint(block=block)])
    group = next(group for group in structures.groups if group.name == curve.name)
    ranked = sorted(range(group.num_units), key=lambda i: (-scores.channels[group.name][i], i))
    widths = [width for width in curve.kept if width < group.num_units]
    return _Survey(curve=curve, points=[GroupPoint(group=group, kept=tuple(ranked[:width])) for width in widths])


def _errors(survey: _Survey, modules: Mapping[str, nn.Module], moments: Moments) -> list[float] | None:
    """What predictions start from; None where all is measured: blocks, few widths, readers without repair."""
    points = [point for point in survey.points if isinstance(point, GroupPoint)]
    if len(points) <= _FEW_WIDTHS:
        return None
    return repair_errors(modules, points[0].group, [point.kept for point in points], moments)


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
