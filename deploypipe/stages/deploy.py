"""From the exported file to what ships: its precision, its engine, the benchmark, the gate and the golden samples."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from deploypipe.benchmark import accuracy_here, compare_files
from deploypipe.budgets import BUDGETS
from deploypipe.errors import DataError, ModelError
from deploypipe.export.onnx_export.golden_samples import write_golden
from deploypipe.export.onnx_export.parity import limit_of
from deploypipe.export.quantization.precision_choice import choose_precision
from deploypipe.export.tensorrt_engine.build_engine import as_model_file, build_engine, is_built
from deploypipe.files.atomic import place_file
from deploypipe.records import (
    BenchmarkReport,
    EngineFile,
    Finished,
    GateDecision,
    Golden,
    Measurement,
    ModelFile,
    PrecisionChoice,
    PrecisionRow,
    Started,
)
from deploypipe.release.gate import decide
from deploypipe.runs.store import StageResult
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.int8_arithmetic import kernels_of
from deploypipe.stages import profile
from deploypipe.stages.context import RunContext
from deploypipe.target import Budget
from deploypipe.task import take_calib

MODEL = "model.onnx"
_NUM_HELD_OUT = 128  # samples for the errors of int8, not among those of `export.int8`


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """The ONNX file that ships, or that the engine is built from."""

    file: ModelFile
    path: Path
    fp32: ModelFile  # what it was converted from, or the file itself


def dense_precision(ctx: RunContext, dense: StageResult[Measurement]) -> StageResult[PrecisionChoice] | None:
    """Choose the precision in which the dense network would ship, and so the one that candidates are timed in.

    None where the target takes fp32 only.
    """
    return _precision(ctx, "dense_precision", dense.record.file, dense.files)


def candidate_precision(dense: Measurement, choice: StageResult[PrecisionChoice] | None) -> PrecisionRow:
    """The precision that candidates are made in: the one chosen for the dense network."""
    return choice.record.row if choice else PrecisionRow(precision="fp32", file=dense.file)


def precision(ctx: RunContext, exported: StageResult[ModelFile]) -> StageResult[PrecisionChoice] | None:
    """Choose the precision in which the compressed network ships; None where the target takes fp32 only."""
    return _precision(ctx, "precision", exported.record, exported.files)


def _precision(ctx: RunContext, stage: str, file: ModelFile, folder: Path) -> StageResult[PrecisionChoice] | None:
    if ctx.target.precisions == ("fp32",):
        return None

    def compute(work: Path) -> PrecisionChoice:
        def as_opened(path: Path) -> Path:
            if not ctx.builds:
                return path
            engines = work / path.stem
            engines.mkdir()
            return engines / build_engine(path, ctx.target, engines).path

        return choose_precision(
            file,
            folder,
            work,
            calib=take_calib(ctx.splits.calib, ctx.recipe.export.int8.num_calib_samples + _NUM_HELD_OUT),
            val=ctx.splits.val,
            timed_on=ctx.timed_on(ctx.splits.val),
            task=ctx.task,
            target=ctx.target,
            settings=ctx.recipe.export,
            runtime=make_runtime(ctx.target) if ctx.ability.verdict == "run" else None,
            as_opened=as_opened,
            notify=ctx.run.notify,
        )

    inputs = {
        "file": file.identity,
        "precisions": ctx.target.precisions,
        "kernels": kernels_of(ctx.target),
        "export": ctx.recipe.export,
        "device": ctx.device,
        **ctx.origin,
    }
    return ctx.run.remember(stage, inputs, compute, PrecisionChoice)


def shipped(fp32: ModelFile, folder: Path, choice: StageResult[PrecisionChoice] | None) -> Shipped:
    """The file in its chosen precision, or the fp32 file itself, which is in `folder`."""
    if choice and choice.record.chosen != "fp32":
        file = choice.record.file
        return Shipped(file=file, path=choice.files / file.path, fp32=fp32)
    return Shipped(file=fp32, path=folder / fp32.path, fp32=fp32)


def engine(ctx: RunContext, dense: StageResult[Measurement], shipped: Shipped) -> StageResult[EngineFile] | None:
    """Build the engine that ships; None where the target takes none, or where this machine cannot build it.

    The dense network's own engine was built with the baseline.
    """
    if not ctx.builds:
        return None
    if shipped.path == dense.files / profile.DENSE:
        return StageResult(record=load_record(dense.files / profile.DENSE_ENGINE), key=dense.key, files=dense.files)
    inputs = {"onnx": shipped.file.identity, "device": ctx.device, "packages": ctx.origin["packages"]}
    return ctx.run.remember("engine", inputs, lambda work: build_engine(shipped.path, ctx.target, work), EngineFile)


def benchmark(
    ctx: RunContext,
    dense: StageResult[Measurement],
    shipped: Shipped,
    engine: StageResult[EngineFile] | None,
    counts: tuple[int, int],
    stand_in: str,
) -> StageResult[BenchmarkReport]:
    """Measure both files in one process, on the test split; the engines where they are what the device runs.

    counts: parameters and multiply-accumulates of what ships. stand_in: what the search went by instead of budgets
    that cannot be measured here. If this machine is not the device, the accuracy is measured on it all the same.
    """
    dense_file = _placed(profile.dense_opened(ctx, dense), dense.files)
    compressed = _placed(shipped.file, shipped.path.parent)
    if engine:
        compressed = _placed(as_model_file(shipped.file, engine.record), engine.files)

    def compute(_: Path) -> BenchmarkReport:
        report = compare_files(
            dense_file,
            compressed,
            folder=ctx.run.path,
            test_batches=ctx.splits.test,
            timed_on=ctx.timed_on(ctx.splits.test),
            task=ctx.task,
            target=ctx.target,
            counts=((dense.record.num_params, dense.record.num_macs), counts),
            notify=ctx.run.notify,
        )
        notes = [stand_in] if stand_in else []
        if ctx.usual is not None:
            notes.append(str(ctx.usual))
        if len(shipped.fp32.tested_sizes) > 1:
            sizes = ", ".join(f"{name} {low} to {high}" for name, (low, high) in shipped.fp32.tested_sizes.items())
            notes.append(f"the fp32 file was compared with the network at {sizes}; other sizes were not tried")
        if is_built(ctx.target) and not engine:
            notes.append("no engine was built: file sizes are those of the ONNX files")
        if report.compressed.accuracy is None:
            onnx_files = (dense.files / profile.DENSE, shipped.path)
            try:
                report = replace(report, accuracy_here=accuracy_here(onnx_files, ctx.splits.test, ctx.task))
            except (ModelError, DataError) as error:  # the device may have operators that this machine lacks
                notes.append(f"the accuracy could not be measured on this machine: {error}")
        return replace(report, notes=(*report.notes, *notes))

    inputs = {"dense": dense_file.identity, "compressed": compressed.identity, "device": ctx.device, **ctx.origin}
    budget = ctx.target.budget
    return ctx.run.remember(
        "benchmark", inputs, compute, BenchmarkReport, is_final=lambda report: _is_final(report, budget)
    )


def _is_final(report: BenchmarkReport, budget: Budget) -> bool:
    """False if a timed budget is undecided because the machine was unsteady: a quieter one may decide it."""
    is_timed = any(BUDGETS[name].source == "timed" for name in budget.limits())
    return not is_timed or report.compressed.latency is None or not report.doubts


def gate(ctx: RunContext, report: BenchmarkReport, shipped: Shipped) -> GateDecision:
    """Decide whether the file may ship. Decided again in every run: what an earlier one measured may be out of date."""
    ctx.run.notify(Started(stage="gate"))
    parity_limit = limit_of(ctx.recipe.export, shipped.file.precision)
    decision = decide(
        report,
        ctx.target.budget,
        parity_limit=parity_limit,
        now=datetime.now(UTC),
        fast_dev_run=ctx.recipe.fast_dev_run,
    )
    ctx.run.notify(Finished(stage="gate"))
    return decision


def golden(ctx: RunContext, shipped: Shipped) -> StageResult[Golden]:
    """Write the ONNX file that ships, with samples to check it by: a folder for `deploypipe verify`."""

    def compute(work: Path) -> Golden:
        place_file(shipped.path, work / MODEL)
        for entry in shipped.file.data:
            place_file(shipped.path.with_name(entry.name), work / entry.name)
        return write_golden(work, {MODEL: shipped.file}, ctx.parity_batches)

    inputs = {"file": shipped.file.identity, "data": ctx.origin["data"], "packages": ctx.origin["packages"]}
    return ctx.run.remember("golden", inputs, compute, Golden)


def _placed(file: ModelFile, folder: Path) -> ModelFile:
    """The file with its path from the run folder on."""
    return replace(file, path=f"{folder.name}/{file.path}")
