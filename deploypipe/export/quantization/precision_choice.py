"""Choose the precision that ships: convert, evaluate and time each one of the target, and reject those not faster."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploypipe.benchmark import first_batch
from deploypipe.benchmark.accuracy import evaluate_file
from deploypipe.benchmark.child_processes.run_child import run_child
from deploypipe.benchmark.latency import find_doubts, time_interleaved
from deploypipe.errors import ModelError, ParityError
from deploypipe.export.quantization.fp16 import to_fp16
from deploypipe.export.quantization.int8 import to_int8
from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.recipe import Export
from deploypipe.records import Converted, Interval, ModelFile, Notify, PrecisionChoice, PrecisionRow, Progress, silent
from deploypipe.runtimes import Array, Runtime
from deploypipe.runtimes.int8_arithmetic import kernels_of
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.target import Precision, Target
from deploypipe.task import Batch, Task

_STAGE = "precision"


def choose_precision(
    source: ModelFile,
    folder: Path,
    work: Path,
    *,
    calib: Sequence[Batch],
    val: Iterable[Batch],
    task: Task,
    target: Target,
    settings: Export,
    runtime: Runtime | None,
    as_opened: Callable[[Path], Path] = lambda path: path,
    timed_on: Iterable[Batch] | None = None,
    notify: Notify = silent,
) -> PrecisionChoice:
    """Convert the fp32 file `folder / source.path` to every other precision of the target, and choose one.

    The files are written to `work`. calib: samples for ranges and errors. val: for the accuracy, which may fall by
    `settings.int8.max_drop_pp`. as_opened: what the runtime opens for an ONNX file, for example an engine. runtime: the
    target's, for timing with `target.num_latency_samples` runs on the first batch of `timed_on` (default: of val); None
    if this machine cannot time.

    With a runtime the fastest precision is chosen; one whose interval does not lie below the time of fp32 is not
    considered. Without it, the first of `target.precisions` that is within its limits is chosen.

    Raises ParityError if no precision of the target is within its limits; ModelError and DataError as the conversions.
    """
    path = folder / source.path
    kernels = kernels_of(target)

    def measure_accuracy(candidate: Path) -> float:
        reader = OnnxRuntime(is_plain=kernels.are_emulated_here)
        return float(evaluate_file(candidate, val, task, reader, target.num_threads).mean())

    rows = [PrecisionRow(precision="fp32", file=source)]
    for precision in (p for p in target.precisions if p != "fp32"):
        notify(Progress(stage=_STAGE, message=precision))
        out = work / f"{precision}.onnx"
        rows.append(_convert(precision, path, out, calib, measure_accuracy, target, settings))
    good = {row.precision: row.file for row in rows if row.file}
    if not set(good) & set(target.precisions):
        reasons = "; ".join(f"{row.precision}: {row.reason}" for row in rows if row.reason)
        raise ParityError(
            f"no precision of the target is within its limits ({reasons}); add 'fp32' to target.precisions"
        )
    ratios: dict[str, Interval] = {}
    doubts: tuple[str, ...] = ()
    if runtime and len(good) > 1:
        notify(Progress(stage=_STAGE, message="latency"))
        files = {name: as_opened(path if name == "fp32" else work / file.path) for name, file in good.items()}
        inputs = first_batch(val if timed_on is None else timed_on, source.input_names, target.batch_size)
        ratios, doubts = _time(files, inputs, runtime, target)
    chosen, why = decide_precision([name for name in target.precisions if name in good], ratios)
    why = f"{why}; the machine was not steady: {'; '.join(doubts)}" if doubts else why
    return PrecisionChoice(
        rows=tuple(replace(row, latency_ratio=ratios.get(row.precision)) for row in rows), chosen=chosen, reason=why
    )


def decide_precision(allowed: Sequence[Precision], ratios: Mapping[str, Interval]) -> tuple[Precision, str]:
    """The precision that ships, and why. allowed: in the target's order; ratios: of latency to that of fp32."""
    if len(allowed) == 1:
        return allowed[0], "the only one of the target that is within its limits"
    if not ratios:
        return allowed[0], "the first of target.precisions within its limits: nothing was timed on this machine"
    paying = [name for name in allowed if name != "fp32" and ratios[name].high < 1]
    if not paying and "fp32" in allowed:
        return "fp32", "no other precision is faster"
    fastest = min(paying or allowed, key=lambda name: ratios[name].value)
    return fastest, f"the fastest within its limits, {ratios[fastest].value:.3f} times the latency of fp32"


def _convert(
    precision: Precision,
    path: Path,
    out: Path,
    calib: Sequence[Batch],
    measure_accuracy: Callable[[Path], float],
    target: Target,
    settings: Export,
) -> PrecisionRow:
    try:
        if precision == "int8":
            return _row(to_int8(path, out, calib, measure_accuracy, kernels_of(target), settings))
        converted = to_fp16(path, out, calib, settings)
    except (ParityError, ModelError) as error:
        return PrecisionRow(precision=precision, file=None, reason=str(error))
    if target.runtime == "onnxruntime" and (trouble := _trouble(converted, out, calib, target)):
        return PrecisionRow(precision=precision, file=None, reason=trouble)
    before, after = measure_accuracy(path), measure_accuracy(out)
    row = _row(replace(converted, accuracy_fp32=before, accuracy=after))
    drop_pp = 100 * (before - after)
    if drop_pp > settings.int8.max_drop_pp:
        reason = (
            f"its accuracy on val is {drop_pp:.2f} points lower; export.int8.max_drop_pp is "
            f"{settings.int8.max_drop_pp:g}"
        )
        return replace(row, file=None, reason=reason)
    return row


def _trouble(converted: Converted, path: Path, calib: Sequence[Batch], target: Target) -> str:
    """Load and run the file with onnxruntime in a child process. Return the error, or ""."""
    inputs = first_batch(calib, converted.file.input_names, 1)
    try:
        run_child("memory_child.py", path, inputs, target, repeats=1, what="run")
    except ModelError as error:
        return str(error)
    return ""


def _row(converted: Converted) -> PrecisionRow:
    return PrecisionRow(precision=converted.file.precision, file=converted.file, conversion=converted)


def _time(
    files: Mapping[str, Path], inputs: Mapping[str, Array], runtime: Runtime, target: Target
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    """Time the files. Return each latency as a share of fp32's, and reasons to doubt the measurement."""
    timings = time_interleaved(list(files.values()), inputs, runtime, target)
    samples = dict(zip(files, timings.samples, strict=True))
    ratios = {
        name: interval_of_median_ratio(times, samples["fp32"], block=timings.block) for name, times in samples.items()
    }
    return ratios, find_doubts(timings, list(files), target.num_threads)
