"""Plan a repair that fits into memory: the samples of each layer, from the sizes of a few samples' activations.

A layer is solved when all samples have reached it, so what they hold there is held at once. If that is too much, fewer
samples are read, at more positions each, so that the number of rows stays. Early layers of a network of images hold the
most and have the most positions; late layers have few positions and need the samples. So layers are repaired in
segments, each with as many samples as it can hold. A segment begins with a pass through the layers before it, which
are repaired already: all segments together cost at most about twice the passes of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from deploypipe.compute_device import CPU
from deploypipe.memory_budget import LiveBytes, tree_bytes
from deploypipe.memory_order import find_order
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.layer_regressions import LinearLike, num_groups, weight_blocks
from deploypipe.pruning.repair.affine_paths import PathEnd, find_paths, hook_path_ends
from deploypipe.pruning.repair.solve_layer import MAX_COLUMNS
from deploypipe.recipe import Repair
from deploypipe.records import RepairFit, RepairSegment
from deploypipe.task import Batch, forward, num_samples, stack_alike, take_calib

_FEW = 2  # samples whose activations are measured
_LEAST_SAMPLES = 32  # of a layer, however little memory there is
_BATCH_SHARE = 8  # samples advance together whose activations take at most this part of the memory
_MAX_BATCH = 64
_TARGETS_SHARE = 0.3  # of the room is left for the targets of further layers: fewer segments, so fewer passes
_LEAST_TOGETHER = 64  # samples, where memory is no question
_MAX_BATCHES = 8  # each of them waits in a thread
_SLACK = 1.2  # for what operations need while they run, and what the heap keeps


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """What the repair of one layer holds. Sizes are of one sample, in bytes, unless they are counts."""

    name: str
    held: float  # at the pause before the layer is solved
    peak: float  # since the pause before
    value: float  # at the end of the layer's path
    num_positions: int
    num_outputs: int
    width: int  # inputs * taps of one group
    num_groups: int

    def num_rows(self, samples: int, positions: int) -> int:
        return samples * min(positions, self.num_positions)

    def target_bytes(self, rows: int) -> int:
        return 4 * rows * self.num_outputs

    def solve_bytes(self, rows: int, *, whole: bool) -> int:
        """What solving holds: patches (while they are cut out of one batch, twice), differences, and the matrices."""
        together = min(self.num_groups, max(1, MAX_COLUMNS // self.width))
        patches = 4 * rows * self.width * together * (2 if whole else 1)
        outputs = self.num_outputs // self.num_groups
        matrices = 8 * together * (6 * self.width**2 + 4 * self.width * outputs)
        return patches + 4 * rows * self.num_outputs * 2 + matrices


def fit_repair(
    dense: nn.Module,
    batches: Sequence[Batch],
    settings: Repair,
    allowed: int,
    *,
    count: int | None = None,
    device: torch.device = CPU,
) -> RepairFit:
    """Plan the repair of any network that is cut out of `dense`, within `allowed` bytes.

    count: how many samples there are, if `batches` are not all of them. device: where the repair will compute.
    The dense network is measured, which holds at least as much as a pruned one: one forward pass over two samples. If
    all samples fit at once, the fit has no segments. Its `num_bytes` exceeds `allowed` if `_LEAST_SAMPLES` do not fit.
    """
    dense = unwrapped(dense)
    layers = _measure(dense, batches)
    given = sum(num_samples(inputs) for inputs, _ in batches)
    total = min(settings.num_samples, given if count is None else count)
    weights = 3 * tree_bytes([*dense.parameters(), *dense.buffers()])
    if not layers:
        return RepairFit(num_bytes=weights, whole_bytes=weights)
    peak = _SLACK * max(max(layer.peak, 3 * layer.value) for layer in layers)
    at_once = min(total, samples_together(total, device) or total)
    moving = at_once * peak if at_once < total else 0.0
    whole = weights + moving + _segment_bytes(layers, total, settings.positions_per_sample, is_one=at_once == total)
    if whole <= allowed:
        return RepairFit(num_bytes=int(whole), whole_bytes=int(whole))
    batch_size = int(max(1, min(_MAX_BATCH, allowed / _BATCH_SHARE // peak)))
    fixed = weights + batch_size * peak
    room = allowed - fixed
    counts = [_most_samples(layer, settings, total, room) for layer in layers]
    counts = [min(counts[place:]) for place in range(len(counts))]  # never fewer again: each segment costs a pass
    segments: list[RepairSegment] = []
    num_bytes = 0.0
    for samples, run in groupby(zip(counts, layers, strict=True), key=lambda pair: pair[0]):
        positions = _positions(settings, total, samples)
        for part in _parts([layer for _, layer in run], samples, positions, room):
            names = tuple(layer.name for layer in part)
            segments.append(RepairSegment(layers=names, num_samples=samples, positions_per_sample=positions))
            num_bytes = max(num_bytes, fixed + _segment_bytes(part, samples, positions))
    return RepairFit(segments=tuple(segments), batch_size=batch_size, num_bytes=int(num_bytes), whole_bytes=int(whole))


def _measure(dense: nn.Module, batches: Sequence[Batch]) -> list[_Layer]:
    """The layers in the order in which their paths end, from one pass over a few samples."""
    few = stack_alike([inputs for inputs, _ in take_calib(batches, _FEW)])[0]
    model, count = copied(dense).eval(), num_samples(few)
    arrange, modules = find_order(model, few), dict(model.named_modules())
    paths = {name: path for name, path in find_paths(model, few).items() if not path.why_not}
    found: list[_Layer] = []
    with LiveBytes() as live:

        def finish(end: PathEnd) -> torch.Tensor:
            found.append(_describe(modules[end.path.layer], end, live, count))
            live.peak = live.now
            return end.value

        with torch.no_grad(), hook_path_ends(model, paths, finish):
            forward(model, arrange(_cloned(few)))
    return found


def _cloned(inputs: Any) -> Any:
    return stack_alike([inputs])[0]


def _describe(layer: LinearLike, end: PathEnd, live: LiveBytes, count: int) -> _Layer:
    groups, outputs, width = weight_blocks(layer).shape
    return _Layer(
        name=end.path.layer,
        held=live.now / count,
        peak=live.peak / count,
        value=end.value.nbytes / count,
        num_positions=end.value.numel() // (count * groups * outputs),
        num_outputs=groups * outputs,
        width=width,
        num_groups=num_groups(layer),
    )


def samples_together(count: int, device: torch.device | None) -> int | None:
    """How many samples advance together where memory is no question; None: all.

    On a CPU, activations of many samples fit no cache and are new pages of memory each time: a repair with 512 images
    took 10 to 25 % longer with all at once than with 64.
    """
    return None if device is not None and device != CPU else max(_LEAST_TOGETHER, -(-count // _MAX_BATCHES))


def _positions(settings: Repair, total: int, count: int) -> int:
    return -(-settings.positions_per_sample * total // count)


def _most_samples(layer: _Layer, settings: Repair, total: int, room: float) -> int:
    """The samples that one layer can hold: all, or half of them as often as it takes.

    Some room is left for the targets of further layers, unless half of the samples have too few positions for all rows.
    """
    count, rows = total, total * settings.positions_per_sample
    while count >= 2 * _LEAST_SAMPLES:
        keeps_rows = count // 2 * layer.num_positions >= rows
        allowed = room * (1 - _TARGETS_SHARE) if keeps_rows else room
        if _segment_bytes([layer], count, _positions(settings, total, count)) <= allowed:
            break
        count = -(-count // 2)
    return count


def _segment_bytes(part: Sequence[_Layer], count: int, positions: int, *, is_one: bool = False) -> float:
    """What the samples hold while they wait, the targets of all layers, and the largest solve. is_one: one batch."""
    rows = [layer.num_rows(count, positions) for layer in part]
    each = [max(layer.peak, layer.held + 2 * layer.value) if is_one else layer.held for layer in part]
    held = max(each) * count * _SLACK
    targets = sum(layer.target_bytes(number) for layer, number in zip(part, rows, strict=True))
    solving = max(layer.solve_bytes(number, whole=is_one) for layer, number in zip(part, rows, strict=True))
    return held + targets + solving


def _parts(layers: Sequence[_Layer], count: int, positions: int, room: float) -> list[list[_Layer]]:
    """Cut a run of layers where the targets of all of them would be too much."""
    parts: list[list[_Layer]] = []
    for layer in layers:
        if parts and _segment_bytes([*parts[-1], layer], count, positions) <= room:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return parts


def repair_text(fit: RepairFit) -> str:
    """What a fit changes, for people; "" if all samples run at once."""
    if not fit.segments:
        return ""
    return ", then ".join(
        f"{segment.num_samples:,} samples at {segment.positions_per_sample:,} positions"
        for segment in _distinct(fit.segments)
    )


def _distinct(segments: Sequence[RepairSegment]) -> list[RepairSegment]:
    return [next(run) for _, run in groupby(segments, key=lambda segment: segment.num_samples)]
