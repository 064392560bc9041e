"""Observe, score, cut and repair one block as a network of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploypipe.blockwise.block_inputs import Calls
from deploypipe.files.hashing import digest
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import empty_plan, make_plan
from deploypipe.pruning.tracing.structures import find_structures
from deploypipe.recipe import Recipe
from deploypipe.records import Edit, GroupCut, PruningPlan, RepairRow, Structures
from deploypipe.scoring import score
from deploypipe.search.allocation.solver import uniform
from deploypipe.task import Batch, forward

Streams: TypeAlias = tuple[list[Tensor], list[Tensor]]  # of the dense and of the pruned network, batch by batch
_BLOCK = "block"  # the name of a block in `StandaloneBlock`


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedBlock:
    """The result for one block; names are those of the whole network."""

    block: str
    cuts: tuple[GroupCut, ...]
    edits: tuple[Edit, ...]
    repair: tuple[RepairRow, ...]
    params_before: int
    params_after: int
    error: float  # of the pruned stream after the block: squared, relative to the variance of the dense stream
    seconds: float


class Pruner:
    """Prune blocks one after the other, each as a network of its own."""

    def __init__(self, calls: Calls, recipe: Recipe, kept: float, channel_multiple: int) -> None:
        self.calls, self.recipe, self.kept, self.multiple = calls, recipe, kept, channel_multiple
        self.known: dict[str, Structures] = {}  # by the shapes of a block: its structures depend on nothing else

    def prune(self, name: str, block: nn.Module, streams: Streams | None) -> tuple[PrunedBlock, nn.Module, Streams]:
        """Prune one block. streams: the inputs of the block; None for the first, whose inputs the network gives."""
        began, recipe = time.perf_counter(), self.recipe
        first = self.calls.stream
        dense, arriving = (self.calls.batches(name, stream) for stream in streams or (first, first))
        alone = self.calls.standalone(name, block)
        plan = self._plan(alone, dense)
        pruned = apply_plan(alone, plan)
        repaired, report = repair(alone, pruned, plan, dense, recipe.repair, arriving=arriving, seed=recipe.seed)
        after = (_run(alone, dense), _run(repaired, arriving))
        row = PrunedBlock(
            block=name,
            cuts=tuple(replace(cut, group=_renamed(cut.group, name)) for cut in plan.cuts),
            edits=tuple(replace(edit, module=_renamed(edit.module, name)) for edit in plan.edits),
            repair=tuple(replace(row, module=_renamed(row.module, name)) for row in report.rows),
            params_before=_num_params(alone),
            params_after=_num_params(repaired),
            error=_error(*after),
            seconds=time.perf_counter() - began,
        )
        return row, repaired.get_submodule(_BLOCK), after

    def _plan(self, alone: nn.Module, batches: Sequence[Batch]) -> PruningPlan:
        structures = self._structures(alone, batches[0][0])
        if not structures.groups:
            return empty_plan(structures)
        moments = observe_activations(alone, structures, batches, self.recipe.observe, seed=self.recipe.seed)
        scores = score(alone, structures, moments, self.recipe.score, seed=self.recipe.seed)
        widths = uniform(structures, self.kept, self.multiple).widths
        return make_plan(structures, scores, widths, channel_multiple=self.multiple)

    def _structures(self, alone: nn.Module, inputs: Any) -> Structures:
        kind = digest([(name, list(value.shape)) for name, value in alone.state_dict().items()])
        if kind not in self.known:
            self.known[kind] = find_structures(alone, inputs)
        return replace(self.known[kind], model_fingerprint=model_fingerprint(alone))


def _renamed(name: str, block: str) -> str:
    """The name in the whole network of a part of a block."""
    return block + name.removeprefix(_BLOCK)


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _run(alone: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [forward(alone, inputs) for inputs, _ in batches]


def _error(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    wrong = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(dense, pruned, strict=True))
    count = sum(a.numel() for a in dense)
    mean = sum(float(a.sum(dtype=torch.float64)) for a in dense) / count
    spread = sum(float((a - mean).square().sum(dtype=torch.float64)) for a in dense)
    return wrong / max(spread, 1e-30)


def summary(row: PrunedBlock) -> str:
    return f"{row.block}: {row.params_before:,} -> {row.params_after:,} parameters, error after it {row.error:.2%}"
