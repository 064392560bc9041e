"""Code that the benchmarks share."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import (
    BatchNormScale,
    ConditionalMi,
    Fpgm,
    LabelMi,
    LayerwiseMi,
    Magnitude,
    Mipp,
    OutputError,
    Random,
    Scorer,
    Taylor,
)
from deploypipe.records import PruningPlan, ScoreTable
from deploypipe.search.allocation.solver import uniform
from deploypipe.task import Batch, Splits, Task, channels_last, stack_batches, take, take_calib
from deploypipe.user_pipeline import UserPipeline

ENTRANTS: dict[str, Scorer] = {
    "magnitude L2": Magnitude(),
    "magnitude L1": Magnitude(power=1),
    "MIPP": Mipp(),
    "MIPP, kept targets": Mipp(keep=0.5),
    "layer-wise MI, joint": LayerwiseMi(),
    "layer-wise MI, independent": LayerwiseMi(joint=False),
    "output error": OutputError(),
    "output error, Fisher": OutputError(fisher=True),
    "conditional MI": ConditionalMi(),
    "label MI": LabelMi(),
    "Taylor": Taylor(),
    "batch norm scale": BatchNormScale(),
    "FPGM": Fpgm(),
    "random": Random(),
}

BATCH = 128


class Subject:
    """A pipeline's trained network, cut to uniform widths with scores of a random half of the calibration samples.

    keep: glob patterns of modules that stay whole; by default the recipe's.
    """

    def __init__(self, pipeline: UserPipeline, keep: Sequence[str] | None = None) -> None:
        self.dense, self.task = with_slim_attention(pipeline.build_model()).eval(), pipeline.task()
        self.splits, self.recipe = pipeline.load_data(), pipeline.recipe()
        self.calib = take_calib(self.splits.calib, 10_000)
        self.inputs = take(self.calib[0][0], 2)
        self.structures = list_structures(self.dense, self.inputs, self.recipe.keep if keep is None else keep)

    def drawn(self, draw: int) -> list[Batch]:
        """A random half of the calibration samples."""
        inputs, target = stack_batches([i for i, _ in self.calib]), torch.cat([t for _, t in self.calib])
        picked = torch.randperm(len(target), generator=torch.Generator().manual_seed(draw))[: len(target) // 2]
        parts = picked.split(BATCH)
        return [(inputs[part], target[part]) for part in parts]

    def moments(self, batches: list[Batch], draw: int) -> Moments:
        settings = replace(self.recipe.observe, num_samples=len(batches) * BATCH)
        loss, real_tokens = self.task.loss, self.task.real_tokens
        return observe_activations(
            self.dense, self.structures, batches, settings, loss=loss, real_tokens=real_tokens, seed=draw
        )

    def cut(self, table: ScoreTable, width: float, batches: list[Batch], draw: int) -> tuple[nn.Module, nn.Module]:
        """The network after slicing only, and after repair."""
        allocation = uniform(self.structures, width, 1)
        plan = make_plan(self.structures, table, allocation.widths, allocation.blocks)
        pruned = apply_plan(self.dense, plan)
        return pruned, self.repaired(pruned, plan, batches, draw)

    def repaired(self, pruned: nn.Module, plan: PruningPlan, batches: list[Batch], draw: int) -> nn.Module:
        real_tokens, settings = self.task.real_tokens, self.recipe.repair
        return repair(self.dense, pruned, plan, batches, settings, real_tokens=real_tokens, seed=draw)[0]

    def macs_kept(self, model: nn.Module) -> float:
        return count_macs(model, self.inputs)[1] / self.structures.num_macs

    def accuracy(self, model: nn.Module) -> float:
        """The accuracy on the test split, in percent."""
        return 100 * float(np.mean(test_hits(model, self.splits, self.task)))


def stage_name(entrant: str, draw: int) -> str:
    return f"{entrant.replace(' ', '_').replace(',', '')}-{draw}"


def with_spread(values: list[float]) -> str:
    """The mean, and in brackets minimum and maximum."""
    spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def test_hits(model: nn.Module, splits: Splits, task: Task) -> NDArray[np.float64]:
    """The metric of every test sample. The model is not changed."""
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batches = ((channels_last(inputs), target) for inputs, target in splits.test)
    return evaluate_module(network, batches, task)
