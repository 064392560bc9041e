"""From the file to what ships, and what is known about it."""

from dataclasses import dataclass, replace
from pathlib import Path

from deploypipe.benchmark import compare_files
from deploypipe.budgets import BUDGETS
from deploypipe.export.onnx_export.golden_samples import write_golden
from deploypipe.export.quantization.precision_choice import choose_precision
from deploypipe.export.tensorrt_engine.build_engine import as_model_file, build_engine, is_built
from deploypipe.files.atomic import place_file
from deploypipe.records import BenchmarkReport, EngineFile, Golden, Measurement, ModelFile, PrecisionChoice
from deploypipe.runtimes import make_runtime
from deploypipe.runtimes.engine_file import load_record
from deploypipe.runtimes.int8_arithmetic import kernels_of
from deploypipe.stages import profile
from deploypipe.stages.context import Job
from deploypipe.target import Budget
from deploypipe.task import take_calib

MODEL = "model.onnx"
_ENGINE = "compressed.engine"
_NUM_HELD_OUT = 128  # samples beside those of `export.int8`, for its errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """The ONNX file that ships, or that the engine is built from."""

    file: ModelFile
    path: Path
    fp32: ModelFile  # what it was converted from, or the file itself


def dense_precision(job: Job, dense: Measurement) -> PrecisionChoice | None:
    """Which precision of the dense network ships, and so the one that candidates are timed in; None where the
    target takes fp32 only."""
    return _precision(job, "dense_precision", dense.file, job.run.files("baseline"))


def precision(job: Job, file: ModelFile) -> PrecisionChoice | None:
    """The same for the compressed network's file."""
    return _precision(job, "precision", file, job.run.files("export"))


def _precision(job: Job, stage: str, file: ModelFile, folder: Path) -> PrecisionChoice | None:
    if job.target.precisions == ("fp32",):
        return None

    def compute(work: Path) -> PrecisionChoice:
        def as_opened(path: Path) -> Path:
            if not job.builds:
                return path
            engines = work / path.stem
            engines.mkdir()
            return engines / build_engine(path, job.target, engines).path

        return choose_precision(
            file,
            folder,
            work,
            calib=take_calib(job.splits.calib, job.recipe.export.int8.num_calib_samples + _NUM_HELD_OUT),
            val=job.splits.val,
            task=job.task,
            target=job.target,
            settings=job.recipe.export,
            runtime=make_runtime(job.target) if job.ability.verdict == "run" else None,
            as_opened=as_opened,
            notify=job.run.notify,
        )

    inputs = {
        "file": file.sha256,
        "precisions": job.target.precisions,
        "kernels": kernels_of(job.target),
        "export": job.recipe.export,
        "device": job.device,
        **job.origin,
    }
    return job.run.remember(stage, inputs, compute, PrecisionChoice)


def shipped(job: Job, file: ModelFile, stage: str, chosen: PrecisionChoice | None) -> Shipped:
    """file: in fp32, of the stage "baseline" or "export"; chosen: by the stage that converted it, if any did."""
    if chosen and chosen.chosen != "fp32":
        converted_by = "precision" if stage == "export" else "dense_precision"
        return Shipped(file=chosen.file, path=job.run.files(converted_by) / chosen.file.path, fp32=file)
    return Shipped(file=file, path=job.run.files(stage) / file.path, fp32=file)


def engine_file(job: Job) -> Path:
    """The engine that ships."""
    if "engine" in job.run.stages:
        return job.run.files("engine") / _ENGINE
    return job.run.files("baseline") / profile.DENSE_ENGINE


def engine(job: Job, shipped: Shipped) -> EngineFile | None:
    """None where the target takes none, or where this machine cannot build it."""
    if not job.builds:
        return None
    if shipped.path == job.run.files("baseline") / profile.DENSE:
        return load_record(engine_file(job))
    inputs = {"onnx": shipped.file.sha256, "device": job.device, "packages": job.origin["packages"]}
    return job.run.remember("engine", inputs, lambda work: build_engine(shipped.path, job.target, work), EngineFile)


def benchmark(
    job: Job, dense: Measurement, shipped: Shipped, engine: EngineFile | None, counts: tuple[int, int], stand_in: str
) -> BenchmarkReport:
    """Both files in one process, on the test split; engines where they are what the device runs."""
    dense_file = _placed(profile.dense_opened(job, dense), job.run.files("baseline").name)
    compressed = dense_file
    if shipped.path != job.run.files("baseline") / profile.DENSE:
        compressed = _placed(shipped.file, shipped.path.parent.name)
    if engine and "engine" in job.run.stages:
        compressed = _placed(as_model_file(shipped.file, engine), job.run.files("engine").name)

    def compute(_: Path) -> BenchmarkReport:
        report = compare_files(
            dense_file,
            compressed,
            folder=job.run.path,
            test_batches=job.splits.test,
            task=job.task,
            target=job.target,
            counts=((dense.num_params, dense.num_macs), counts),
            notify=job.run.notify,
        )
        notes = [stand_in] if stand_in else []
        if len(shipped.fp32.tested_sizes) > 1:
            sizes = ", ".join(f"{name} {low} to {high}" for name, (low, high) in shipped.fp32.tested_sizes.items())
            notes.append(f"the fp32 file was compared with the network at {sizes}; other sizes were not tried")
        if is_built(job.target) and not engine:
            notes.append("no engine was built: file sizes are those of the ONNX files")
        return replace(report, notes=(*report.notes, *notes))

    inputs = {"dense": dense_file.sha256, "compressed": compressed.sha256, "device": job.device, **job.origin}
    budget = job.target.budget
    return job.run.remember(
        "benchmark", inputs, compute, BenchmarkReport, is_final=lambda report: _is_final(report, budget)
    )


def _is_final(report: BenchmarkReport, budget: Budget) -> bool:
    """False if a timed budget is undecided because the machine was unsteady: a quieter one may decide it."""
    is_timed = any(BUDGETS[name].source == "timed" for name in budget.limits())
    return not is_timed or report.compressed.latency is None or not report.doubts


def golden(job: Job, shipped: Shipped) -> Golden:
    """The ONNX file that ships, with samples that it can be checked by: a folder for `deploypipe verify`."""

    def compute(work: Path) -> Golden:
        place_file(shipped.path, work / MODEL)
        for entry in shipped.file.data:
            place_file(shipped.path.with_name(entry.name), work / entry.name)
        return write_golden(work, {MODEL: shipped.file}, job.parity_batches)

    inputs = {"file": shipped.file.sha256, "data": job.origin["data"], "packages": job.origin["packages"]}
    return job.run.remember("golden", inputs, compute, Golden)


def _placed(file: ModelFile, folder: str) -> ModelFile:
    return replace(file, path=f"{folder}/{file.path}")
