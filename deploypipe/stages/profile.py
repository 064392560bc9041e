"""What is found out about the dense network: its files, its structures, its speed, what its layers do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deploypipe.benchmark import measure, unmeasured
from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.input_sizes import ends_of, shapes_of
from deploypipe.export.tensorrt_engine.build_engine import as_model_file, build_engine
from deploypipe.files.atomic import place_file
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.moments import Moments, load_moments, save_moments
from deploypipe.pruning.tracing.module_calls import one_thread_if_small
from deploypipe.pruning.tracing.structures import count_macs, list_structures
from deploypipe.recipe import Mpruner
from deploypipe.records import Curves, Measurement, ModelFile, Observation, ResolvedConstraints, ScoreTable, Structures
from deploypipe.runtimes.engine_file import load_record
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.blocks import rank_blocks
from deploypipe.search.allocation.loss_curves import measure_curves
from deploypipe.stages.context import Job

DENSE, DENSE_ENGINE = "dense.onnx", "dense.engine"
TEMPLATE = "template.onnx"
_HALVES = ("first.safetensors", "second.safetensors")  # of the calibration samples


def structures(job: Job) -> Structures:
    """What may be removed of the network, under the recipe's constraints."""
    keep, constraints = job.recipe.keep, job.recipe.constraints
    others = ends_of(job.other_inputs)
    return job.run.remember(
        "structures",
        {**job.origin, "keep": keep, "constraints": constraints, "sizes": [shapes_of(each) for each in others]},
        lambda _: list_structures(job.model, job.inputs, keep, constraints, other_inputs=others),
        Structures,
        is_shared=True,
    )


def dense_export(job: Job, meanwhile: Callable[[], object] | None = None) -> ModelFile:
    """The dense network's ONNX file, and beside it the template that candidates are cut out of."""

    def compute(work: Path) -> ModelFile:
        template = work / TEMPLATE
        return export_onnx(
            job.model,
            job.parity_batches,
            work / DENSE,
            job.recipe.export,
            template=template,
            other_inputs=job.other_inputs,
        )

    sizes = [shapes_of(each) for each in job.other_inputs]
    inputs = {**job.origin, "export": job.recipe.export, "sizes": sizes}
    return job.run.remember("dense_export", inputs, compute, ModelFile, is_shared=True, meanwhile=meanwhile)


def baseline(job: Job, file: ModelFile) -> Measurement:
    """The dense network's file, measured by the method used at the end."""

    def compute(work: Path) -> Measurement:
        for path in job.run.files("dense_export").iterdir():
            place_file(path, work / path.name)
        counts = count_macs(job.model, job.inputs)
        opened = as_model_file(file, build_engine(work / DENSE, job.target, work)) if job.builds else file
        if job.ability.verdict != "run":
            return unmeasured(file, counts)
        measured = measure(
            opened,
            folder=work,
            batches=job.splits.val,
            task=job.task,
            target=job.target,
            counts=counts,
            notify=job.run.notify,
        )
        return replace(measured, file=file)

    inputs = {**job.origin, "device": job.device, "file": file.sha256}
    return job.run.remember("baseline", inputs, compute, Measurement)


def dense_opened(job: Job, dense: Measurement) -> ModelFile:
    """What the device opens of the dense network: the ONNX file, or an engine."""
    if not job.builds:
        return dense.file
    return as_model_file(dense.file, load_record(job.run.files("baseline") / DENSE_ENGINE))


def dense_accuracy(job: Job, dense: Measurement) -> float:
    """On val: of the exported file where it runs here, of the network itself elsewhere, as a search needs it."""
    if dense.accuracy is not None:
        return dense.accuracy.value
    return float(evaluate_module(job.model, job.splits.val, job.task).mean())


def observe(job: Job, structures: Structures) -> tuple[Moments, Moments]:
    """What the layers give on the calibration samples: statistics of two halves of them."""
    loss = job.task.loss if needs_derivatives(job.recipe.score) else None

    def compute(work: Path) -> Observation:
        settings, seed = job.recipe.observe, job.recipe.seed
        halves = observe_halves(
            job.model,
            structures,
            job.calib,
            settings,
            loss=loss,
            real_tokens=job.task.real_tokens,
            seed=seed,
            notify=job.run.notify,
        )
        for name, half in zip(_HALVES, halves, strict=True):
            save_moments(half, work / name)
        return Observation(num_samples=sum(half.num_samples for half in halves), skipped=halves[0].skipped)

    inputs = {
        **job.origin,
        "structures": replace(structures, constraints=ResolvedConstraints()),  # they bound what is chosen later
        "observe": job.recipe.observe,
        "derivatives": loss is not None,
    }
    job.run.remember("observe", inputs, compute, Observation, is_shared=True)
    first, second = (load_moments(job.run.files("observe") / name) for name in _HALVES)
    return first, second


def score(job: Job, structures: Structures, halves: tuple[Moments, Moments], moments: Moments) -> ScoreTable:
    """The importance of every unit, by the recipe's method."""

    def compute(_: Path) -> ScoreTable:
        with one_thread_if_small(0):  # thousands of small products
            return score_halves(job.model, structures, halves, moments, job.recipe.score, seed=job.recipe.seed)

    inputs = {"observe": job.run.key("observe"), "score": job.recipe.score}
    return job.run.remember("score", inputs, compute, ScoreTable, is_shared=True)


def curves(job: Job, structures: Structures, scores: ScoreTable, moments: Moments) -> Curves:
    """What each group loses at each width, and each block when it goes."""

    def compute(_: Path) -> Curves:
        measured = measure_curves(
            job.model,
            structures,
            scores,
            moments,
            job.calib,
            job.recipe.search,
            channel_multiple=job.target.channel_multiple,
            distillation_loss=job.task.distillation_loss,
            notify=job.run.notify,
        )
        if not settings.prune_blocks or not structures.blocks:
            return measured
        ranking = rank_blocks(job.model, structures, moments, job.calib, Mpruner())
        return replace(measured, block_importance=ranking.importance)

    settings = job.recipe.search
    inputs = {
        "score": job.run.key("score"),
        "search": [settings.num_curve_samples, settings.num_levels, settings.prune_blocks],
        "block_importance": Mpruner(),
        "multiple": job.target.channel_multiple,
        "constraints": structures.constraints,
    }
    return job.run.remember("curves", inputs, compute, Curves, is_shared=True)
