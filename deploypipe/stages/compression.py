"""From a plan to a trained network and its ONNX file."""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.parity import compare_networks
from deploypipe.files.hashing import digest
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.modules.module_calls import one_thread_if_small
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe
from deploypipe.pruning.surgery.saved_network import own_weights, save_pruned
from deploypipe.recipe import Finetune
from deploypipe.records import ModelFile, Notify, PruneOutcome, PruningPlan, RepairReport, TrainLog, as_part_of
from deploypipe.runs.store import StageResult
from deploypipe.stages.context import RunContext
from deploypipe.task import Task, num_samples
from deploypipe.training.multi_rank_finetune import finetune_together

_COMPRESSED = "compressed.onnx"
_WEIGHTS = "weights.safetensors"


def prune(ctx: RunContext, plan: PruningPlan) -> StageResult[PruneOutcome]:
    """Apply the plan and repair the layers that are left. The stage's file holds their weights."""

    def compute(work: Path) -> PruneOutcome:
        pruned = apply_plan(ctx.model, plan)
        report = describe(ctx.model, pruned, plan, ctx.inputs)
        repaired, repairs = repair_network(ctx, plan, pruned, as_part_of("prune", ctx.run.notify))
        save_file(own_weights(repaired), work / _WEIGHTS)
        return PruneOutcome(prune=report, repair=repairs)

    inputs = {**ctx.origin, **repair_inputs(ctx), "plan": plan}
    return ctx.run.remember("prune", inputs, compute, PruneOutcome, is_shared=True)


def repair_inputs(ctx: RunContext) -> dict[str, object]:
    """The settings that a repaired network depends on, besides the run's origin and the plan."""
    settings: dict[str, object] = {
        "repair": ctx.recipe.repair,
        "num_calib_samples": sum(num_samples(inputs) for inputs, _ in ctx.calib),
    }
    fits = (ctx.memory.repair, ctx.memory.trial_repair)
    changed = [(fit.segments, fit.batch_size) for fit in fits if fit.segments]
    return {**settings, "segments": changed} if changed else settings


def repair_network(
    ctx: RunContext, plan: PruningPlan, pruned: nn.Module, notify: Notify
) -> tuple[nn.Module, RepairReport]:
    """Repair a pruned network as the recipe says, without storing it."""
    return repair(
        ctx.model,
        pruned,
        plan,
        ctx.calib,
        ctx.recipe.repair,
        real_tokens=ctx.task.real_tokens,
        seed=ctx.recipe.seed,
        notify=notify,
        fit=ctx.memory.repair,
        device=ctx.compute.device,
    )


def finetune(ctx: RunContext, plan: PruningPlan, pruned: StageResult[PruneOutcome]) -> StageResult[TrainLog]:
    """Train what `prune` left. The stage's files are the trained network, as `load_pruned` reads it."""

    def compute(work: Path) -> TrainLog:
        checkpoints = work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        repaired = _with_weights(ctx, plan, pruned.files)
        tuned, log = tune(ctx, plan, repaired, ctx.recipe.finetune, checkpoints, ctx.run.notify)
        save_pruned(tuned, plan, ctx.inputs, work)
        shutil.rmtree(checkpoints)
        return log

    inputs = {"prune": pruned.key, "finetune": ctx.recipe.finetune, **own_training(ctx.task)}
    return ctx.run.remember("finetune", inputs, compute, TrainLog, is_shared=True)


def own_training(task: Task) -> dict[str, str]:
    """The text of the task's own training functions, by name, for keys: where the library is called, a run has no
    source text. A function without text (of a console, compiled) stands for itself by its name."""
    functions = {"optimizer": task.optimizer, "schedule": task.schedule, "training_step": task.training_step}
    return {name: _text_of(function) for name, function in functions.items() if function is not None}


def _text_of(function: Callable[..., object]) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return getattr(function, "__qualname__", type(function).__qualname__)


def tune(
    ctx: RunContext, plan: PruningPlan, repaired: nn.Module, settings: Finetune, checkpoint: Path, notify: Notify
) -> tuple[nn.Module, TrainLog]:
    """Train a repaired network on all ranks, without storing it; resume from its checkpoint if there is one.

    The dense network's outputs are kept for the training of other plans, also for other targets.
    """
    teacher_outputs = (ctx.run.shared or ctx.run.path) / f"teacher-outputs-{digest([ctx.origin, settings.precision])}"
    with one_thread_if_small(_batch_macs(ctx)):
        return finetune_together(
            repaired,
            plan,
            ctx.model,
            ctx.splits,
            ctx.task,
            settings,
            checkpoint=checkpoint,
            teacher_outputs=teacher_outputs,
            seed=ctx.recipe.seed,
            notify=notify,
            ranks=ctx.ranks,
            accelerator=ctx.compute.accelerator,
        )


def _batch_macs(ctx: RunContext) -> int:
    """Multiply-accumulates of the dense network on one batch of the training split."""
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(ctx.splits.train), None)
    return num_samples(batch[0]) * count_macs(ctx.model, ctx.inputs)[1] if batch else 0


def _with_weights(ctx: RunContext, plan: PruningPlan, folder: Path) -> nn.Module:
    """The pruned network with the weights in a stage's folder."""
    pruned = apply_plan(ctx.model, plan)
    pruned.load_state_dict(load_file(folder / _WEIGHTS))
    return pruned


def export(ctx: RunContext, plan: PruningPlan, tuned: StageResult[TrainLog]) -> StageResult[ModelFile]:
    """Write the ONNX file, in fp32, of the network that `finetune` left."""

    def compute(work: Path) -> ModelFile:
        network = _with_weights(ctx, plan, tuned.files)
        file = export_onnx(
            network,
            ctx.parity_batches,
            work / _COMPRESSED,
            ctx.recipe.export,
            origin={"plan": digest(plan), "recipe": digest(ctx.result_settings()), "dense_model": ctx.origin["model"]},
            class_names=ctx.task.class_names,
            other_inputs=ctx.other_inputs,
        )
        apart = compare_networks(ctx.model, network, ctx.parity_batches, device=ctx.compute.device)
        return replace(file, from_dense=apart)

    inputs = {
        "finetune": tuned.key,
        "recipe": ctx.result_settings(),  # its hash goes into the file
        "class_names": ctx.task.class_names,
    }
    return ctx.run.remember("export", inputs, compute, ModelFile)
