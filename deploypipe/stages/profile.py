"""Examine the dense network: its structures, files, speed, layer statistics, and the loss of each cut."""

from dataclasses import replace
from pathlib import Path

from deploypipe.benchmark import measure, unmeasured
from deploypipe.benchmark.accuracy import evaluate_file, evaluate_module
from deploypipe.compute_device import CPU
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.input_sizes import ends_of, shapes_of
from deploypipe.export.tensorrt_engine.build_engine import as_model_file, build_engine
from deploypipe.files.atomic import place_file
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.pass_statistics import Moments, load_moments, merge, save_moments
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.modules.module_calls import one_thread_if_small
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Mpruner
from deploypipe.records import (
    Curves,
    Measurement,
    ModelFile,
    Observation,
    ResolvedConstraints,
    ScoreSummary,
    ScoreTable,
    Structures,
)
from deploypipe.runs.store import StageResult
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.scoring.score_summary import summarise
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.stages.context import RunContext
from deploypipe.task import cut_batches

DENSE, DENSE_ENGINE = "dense.onnx", "dense.engine"
TEMPLATE = "template.onnx"
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples


def structures(ctx: RunContext) -> StageResult[Structures]:
    """List what may be removed from the network under the recipe's constraints."""
    keep, constraints = ctx.recipe.keep, ctx.recipe.constraints
    others = ends_of(ctx.other_inputs)
    return ctx.run.remember(
        "structures",
        {**ctx.origin, "keep": keep, "constraints": constraints, "sizes": [shapes_of(each) for each in others]},
        lambda _: list_structures(ctx.model, ctx.inputs, keep, constraints, other_inputs=others),
        Structures,
        is_shared=True,
    )


def dense_export(ctx: RunContext) -> StageResult[ModelFile]:
    """Write the dense network's ONNX file, and next to it the template that candidates are cut out of."""

    def compute(work: Path) -> ModelFile:
        template = work / TEMPLATE
        return export_onnx(
            ctx.model,
            ctx.parity_batches,
            work / DENSE,
            ctx.recipe.export,
            template=template,
            other_inputs=ctx.other_inputs,
        )

    sizes = [shapes_of(each) for each in ctx.other_inputs]
    inputs = {**ctx.origin, "export": ctx.recipe.export, "sizes": sizes}
    return ctx.run.remember("dense_export", inputs, compute, ModelFile, is_shared=True)


def baseline(ctx: RunContext, exported: StageResult[ModelFile]) -> StageResult[Measurement]:
    """Measure the dense network's file, as the last benchmark does. The stage's files are those of `dense_export`,
    and the engine where the target runs one."""
    file = exported.record

    def compute(work: Path) -> Measurement:
        for path in exported.files.iterdir():
            place_file(path, work / path.name)
        counts = count_macs(ctx.model, ctx.inputs)
        opened = as_model_file(file, build_engine(work / DENSE, ctx.target, work)) if ctx.builds else file
        if ctx.ability.verdict != "run":
            return unmeasured(file, counts)
        measured = measure(
            opened,
            folder=work,
            batches=ctx.splits.val,
            timed_on=ctx.timed_on(ctx.splits.val),
            task=ctx.task,
            target=ctx.target,
            counts=counts,
            notify=ctx.run.notify,
        )
        return replace(measured, file=file)

    inputs = {**ctx.origin, "device": ctx.device, "file": file.identity}
    return ctx.run.remember("baseline", inputs, compute, Measurement)


def dense_opened(ctx: RunContext, dense: StageResult[Measurement]) -> ModelFile:
    """The file of the dense network that the device opens: the ONNX file, or an engine."""
    file = dense.record.file
    return as_model_file(file, load_record(dense.files / DENSE_ENGINE)) if ctx.builds else file


def dense_accuracy(ctx: RunContext, dense: StageResult[Measurement]) -> float:
    """The accuracy on val, as a search needs it: of what the target ran, else as candidates are evaluated.

    Candidates are evaluated on the run's GPU, or by their fp32 file on the CPU.
    """
    if dense.record.accuracy is not None:
        return dense.record.accuracy.value
    if ctx.compute.device != CPU:
        return float(evaluate_module(ctx.model, ctx.splits.val, ctx.task, device=ctx.compute.device).mean())
    file = dense.files / DENSE
    return float(evaluate_file(file, ctx.splits.val, ctx.task, OnnxRuntime(), ctx.target.num_threads).mean())


def observe(ctx: RunContext, structures: Structures) -> StageResult[Observation]:
    """Run the calibration samples through the network. The stage's files are its layers' statistics (`load_halves`)."""
    loss = ctx.task.loss if needs_derivatives(ctx.recipe.score) else None

    def compute(work: Path) -> Observation:
        settings, seed, at_once = ctx.recipe.observe, ctx.recipe.seed, ctx.memory.observe.max_samples
        halves = observe_halves(
            ctx.model,
            structures,
            cut_batches(ctx.calib, at_once) if at_once else ctx.calib,
            settings,
            loss=loss,
            real_tokens=ctx.task.real_tokens,
            seed=seed,
            notify=ctx.run.notify,
            device=ctx.compute.device,
        )
        for name, half in zip(_HALVES, halves, strict=True):
            save_moments(half, work / name)
        return Observation(num_samples=sum(half.num_samples for half in halves), skipped=halves[0].skipped)

    inputs = {
        **ctx.origin,
        "structures": replace(structures, constraints=ResolvedConstraints()),  # they bound what is chosen later
        "observe": ctx.recipe.observe,
        "derivatives": loss is not None,
        **({"max_samples": ctx.memory.observe.max_samples} if ctx.memory.observe.max_samples else {}),
    }
    return ctx.run.remember("observe", inputs, compute, Observation, is_shared=True)


def load_halves(observed: StageResult[Observation]) -> tuple[Moments, Moments]:
    """The statistics of each half of the calibration samples."""
    first, second = (load_moments(observed.files / name) for name in _HALVES)
    return first, second


def score(ctx: RunContext, structures: Structures, observed: StageResult[Observation]) -> StageResult[ScoreTable]:
    """Rate the importance of every unit by the recipe's method."""

    def compute(_: Path) -> ScoreTable:
        halves = load_halves(observed)
        with one_thread_if_small(0):  # thousands of small products
            return score_halves(ctx.model, structures, halves, merge(*halves), ctx.recipe.score, seed=ctx.recipe.seed)

    inputs = {"observe": observed.key, "score": ctx.recipe.score}
    return ctx.run.remember("score", inputs, compute, ScoreTable, is_shared=True)


def score_summary(structures: Structures, scores: ScoreTable, observed: StageResult[Observation]) -> ScoreSummary:
    """Summarise the scores for the report."""
    return summarise(structures, scores, merge(*load_halves(observed)))


def loss_curves(
    ctx: RunContext, structures: Structures, scores: StageResult[ScoreTable], observed: StageResult[Observation]
) -> StageResult[Curves]:
    """Measure the loss of cutting each group to each width, and of removing each block."""
    settings = ctx.recipe.search

    def compute(_: Path) -> Curves:
        moments = merge(*load_halves(observed))
        measured = measure_curves(
            ctx.model,
            structures,
            scores.record,
            moments,
            ctx.calib,
            settings,
            channel_multiple=ctx.target.channel_multiple,
            distillation_loss=ctx.task.distillation_loss,
            device=ctx.compute.device,
            notify=ctx.run.notify,
        )
        if not settings.prune_blocks or not structures.blocks:
            return measured
        ranking = rank_blocks(ctx.model, structures, moments, ctx.calib, Mpruner(), device=ctx.compute.device)
        return replace(measured, block_importance=ranking.importance)

    inputs = {
        "score": scores.key,
        "search": [settings.num_curve_samples, settings.num_levels, settings.curves, settings.prune_blocks],
        "block_importance": Mpruner(),
        "multiple": ctx.target.channel_multiple,
        "constraints": structures.constraints,
    }
    return ctx.run.remember("curves", inputs, compute, Curves, is_shared=True)
