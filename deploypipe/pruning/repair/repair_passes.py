"""The passes of a repair: the dense network gives targets at sampled positions, the pruned one pauses and is solved."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploypipe.compute_device import to_device
from deploypipe.memory_order import Arrange
from deploypipe.observe.layer_regressions import LinearLike, sample_outputs, sample_positions, writes
from deploypipe.pruning.repair.affine_paths import PathEnd, SignalPath, hook_path_ends
from deploypipe.pruning.repair.batches_in_lockstep import Stopped, run_in_lockstep
from deploypipe.pruning.repair.solve_layer import solve_layer_
from deploypipe.records import PruningPlan, RepairRow, RepairSegment
from deploypipe.task import Batch, RealTokens, find_real_tokens, forward, group_alike, stack_batches, take_calib

Piece: TypeAlias = list[Any]  # inputs that are stacked to one batch when it is passed


def cut_in_pieces(taken: Sequence[Batch], segment: RepairSegment, size: int | None) -> list[Piece]:
    """The segment's samples, as groups that are passed at once."""
    return group_alike([inputs for inputs, _ in take_calib(taken, segment.num_samples)], size)


def real_tokens_of(piece: Piece, real_tokens: RealTokens | None) -> Tensor | None:
    """The piece's mask of real tokens; stacked only if there is one."""
    if find_real_tokens(piece[0], real_tokens) is None:
        return None
    return find_real_tokens(stack_batches(piece), real_tokens)


@dataclass(kw_only=True, slots=True)
class RepairWork:
    """Both networks, on the device that computes, and what there is to repair."""

    teacher: nn.Module
    repaired: nn.Module
    paths: Mapping[str, SignalPath]  # by layer, of the repaired network
    dense_ends: Mapping[str, SignalPath]  # by layer, the path in the dense network whose end it should give
    plan: PruningPlan
    ridge: float
    seed: int
    arrange: Arrange
    device: torch.device | None
    rows: list[RepairRow]  # of the layers so far

    def run_(
        self,
        segment: RepairSegment,
        dense_pieces: Sequence[Piece],
        pieces: Sequence[Piece],
        real: Sequence[Tensor | None],
        report: Callable[[str], None],
    ) -> None:
        """Solve the layers of one segment, on pieces of what the dense and what the repaired network reads.

        real: each piece's mask of real tokens.
        """
        paths = {layer: path for layer, path in self.paths.items() if layer in segment.layers}
        if not paths:
            return
        sampler = _Sampler(segment.positions_per_sample, self.seed, self.teacher, real)
        targets = self._dense_targets(paths, sampler, dense_pieces)
        modules = dict(self.repaired.named_modules())

        def solve(ends: Sequence[PathEnd]) -> list[Tensor]:
            path = ends[0].path
            layer, norm = modules[path.layer], modules[path.norm] if path.norm else None
            places = [sampler.positions(path.layer, layer, end.value, number) for number, end in enumerate(ends)]
            target = _without_others(targets.pop(path.layer), layer, ends, places)
            row, values = solve_layer_(ends, layer, norm, places, target, self.ridge, in_place=len(ends) > 1)
            self.rows.append(row)
            report(path.layer)
            return values

        makes = [partial(self._stacked, piece) for piece in pieces]
        run_in_lockstep(self.repaired, paths, solve, makes, is_part=len(paths) < len(self.paths))

    def _stacked(self, piece: Piece) -> Any:
        return self.arrange(to_device(stack_batches(piece), self.device))

    def _dense_targets(
        self, paths: Mapping[str, SignalPath], sampler: "_Sampler", pieces: Sequence[Piece]
    ) -> dict[str, list[Tensor]]:
        """The dense network's values: layer to repair -> (rows, kept outputs) for each piece."""
        layers_at = {self.dense_ends[layer].layer: layer for layer in paths}
        ends = {path.layer: path for path in (self.dense_ends[layer] for layer in paths)}
        modules, removed = dict(self.teacher.named_modules()), self._removed_outputs()
        targets: dict[str, list[Tensor]] = {}
        num_left = 0

        def record(end: PathEnd) -> Tensor:
            nonlocal num_left
            name = layers_at[end.path.layer]
            layer = modules[name]
            seen = targets.setdefault(name, [])
            total = end.value if end.other is None else end.value + end.other
            rows = sample_outputs(layer, total, sampler.positions(name, layer, end.value, len(seen)))
            kept = [i for i in range(rows.shape[1]) if i not in removed.get(name, set())]
            seen.append(rows[:, kept])
            num_left -= 1
            if num_left == 0:
                raise Stopped
            return end.value

        with torch.no_grad(), hook_path_ends(self.teacher, ends, record):
            for piece in pieces:
                num_left = len(ends)
                with suppress(Stopped):
                    forward(self.teacher, self._stacked(piece))
        return targets

    def _removed_outputs(self) -> dict[str, set[int]]:
        modules = dict(self.teacher.named_modules())
        removed: dict[str, set[int]] = {}
        for edit in self.plan.edits:
            if edit.module in modules and writes(modules[edit.module], edit.side):
                removed.setdefault(edit.module, set()).update(edit.removed)
        return removed


def _without_others(
    wanted: list[Tensor], layer: LinearLike, ends: Sequence[PathEnd], places: Sequence[Tensor]
) -> Tensor:
    """The rows that a layer should give (rows, outputs): at an addition, less the other operand."""
    for number, (end, at) in enumerate(zip(ends, places, strict=True)):
        if end.other is not None:
            wanted[number] = wanted[number] - sample_outputs(layer, end.other.expand_as(end.value), at)
    return wanted[0].contiguous() if len(wanted) == 1 else torch.cat(wanted)


class _Sampler:
    """Draw the same output positions of a layer in the dense and in the pruned network."""

    def __init__(self, count: int, seed: int, model: nn.Module, real: Sequence[Tensor | None]) -> None:
        self.count, self.seed, self.real = count, seed, real
        self.order = {name: number for number, (name, _) in enumerate(model.named_modules())}

    def positions(self, name: str, layer: LinearLike, output: Tensor, piece: int) -> Tensor:
        """The positions for the samples of one piece, on the CPU: they are the same on every device."""
        seed = self.seed * 100_003 + self.order[name] + piece * 10_000_019
        return sample_positions(layer, output, self.count, torch.Generator().manual_seed(seed), self.real[piece])
