"""From a plan to a trained network and its file."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.parity import compare_networks
from deploypipe.files.hashing import digest
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan, describe
from deploypipe.pruning.surgery.saved_network import own_weights, save_pruned
from deploypipe.pruning.tracing.module_calls import one_thread_if_small
from deploypipe.pruning.tracing.structures import count_macs
from deploypipe.recipe import Finetune
from deploypipe.records import ModelFile, Progress, PruneOutcome, PruningPlan, RepairReport, TrainLog
from deploypipe.stages.context import Job
from deploypipe.task import num_samples
from deploypipe.training.multi_rank_finetune import finetune_together

_COMPRESSED = "compressed.onnx"


def prune(job: Job, plan: PruningPlan) -> PruneOutcome:
    """The network that the plan leaves, its layers solved anew; its weights are a file of the stage."""

    def compute(work: Path) -> PruneOutcome:
        report = describe(job.model, apply_plan(job.model, plan), plan, job.inputs)
        repaired, repairs = make_repaired(job, plan, lambda event: job.run.notify(replace(event, stage="prune")))
        save_file(own_weights(repaired), work / "weights.safetensors")
        return PruneOutcome(prune=report, repair=repairs)

    inputs = {**job.origin, "plan": plan, "calib": job.run.key("observe"), "repair": job.recipe.repair}
    return job.run.remember("prune", inputs, compute, PruneOutcome, is_shared=True)


def make_repaired(job: Job, plan: PruningPlan, notify: Progress) -> tuple[nn.Module, RepairReport]:
    """The same, not remembered."""
    pruned, real_tokens = apply_plan(job.model, plan), job.task.real_tokens
    settings, seed = job.recipe.repair, job.recipe.seed
    return repair(job.model, pruned, plan, job.calib, settings, real_tokens=real_tokens, seed=seed, notify=notify)


def finetune(job: Job, plan: PruningPlan) -> TrainLog:
    """Train what `prune` left; the stage's files are the trained network, as `load_pruned` reads it."""

    def compute(work: Path) -> TrainLog:
        checkpoints = work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        repaired = restored(job, plan, "prune")
        tuned, log = tune(job, plan, repaired, job.recipe.finetune, checkpoints, job.run.notify)
        save_pruned(tuned, plan, job.inputs, work)
        shutil.rmtree(checkpoints)
        return log

    inputs = {"prune": job.run.key("prune"), "finetune": job.recipe.finetune}
    return job.run.remember("finetune", inputs, compute, TrainLog, is_shared=True)


def tune(
    job: Job, plan: PruningPlan, repaired: nn.Module, settings: Finetune, checkpoint: Path, notify: Progress
) -> tuple[nn.Module, TrainLog]:
    """Train a repaired network on all ranks, resumed from its checkpoint where there is one; not remembered.

    What the dense network answers to the batches is kept for the trainings of other plans, also for other targets.
    """
    teacher_outputs = (job.run.shared or job.run.path) / f"teacher-outputs-{digest([job.origin, settings.precision])}"
    with one_thread_if_small(_batch_macs(job)):
        return finetune_together(
            repaired,
            plan,
            job.model,
            job.splits,
            job.task,
            settings,
            checkpoint=checkpoint,
            teacher_outputs=teacher_outputs,
            seed=job.recipe.seed,
            notify=notify,
            ranks=job.ranks,
        )


def _batch_macs(job: Job) -> int:
    """Multiply-accumulates of the dense network on one batch of the training split."""
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(job.splits.train), None)
    return num_samples(batch[0]) * count_macs(job.model, job.inputs)[1] if batch else 0


def restored(job: Job, plan: PruningPlan, stage: str) -> nn.Module:
    """The pruned network with the weights a stage left."""
    pruned = apply_plan(job.model, plan)
    pruned.load_state_dict(load_file(job.run.files(stage) / "weights.safetensors"))
    return pruned


def export(job: Job, plan: PruningPlan) -> ModelFile:
    """The ONNX file of what `finetune` left, in fp32."""

    def compute(work: Path) -> ModelFile:
        tuned = restored(job, plan, "finetune")
        file = export_onnx(
            tuned,
            job.parity_batches,
            work / _COMPRESSED,
            job.recipe.export,
            origin={"plan": digest(plan), "recipe": digest(job.recipe), "dense_model": job.fingerprint},
            class_names=job.task.class_names,
            other_inputs=job.other_inputs,
        )
        return replace(file, from_dense=compare_networks(job.model, tuned, job.parity_batches))

    inputs = {
        "finetune": job.run.key("finetune"),
        "recipe": job.recipe,  # its hash goes into the file
        "class_names": job.task.class_names,
    }
    return job.run.remember("export", inputs, compute, ModelFile)
