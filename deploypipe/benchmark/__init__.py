"""Measure a model file on the target: latency, memory and accuracy, with their evidence."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np

from deploypipe.benchmark.accuracy import evaluate_file
from deploypipe.benchmark.bench_file import bench_file as bench_file
from deploypipe.benchmark.bench_results import BenchResult as BenchResult
from deploypipe.benchmark.described_split import DescribedSplit
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import Timings, conditions_of, find_doubts, summarise, time_steadily
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.errors import DataError, RuntimeUnavailableError
from deploypipe.numerics.intervals import interval_of_drop_pp, interval_of_mean, interval_of_median_ratio
from deploypipe.records import AccuracyHere, BenchmarkReport, Measurement, ModelFile, Notify, Progress, silent
from deploypipe.runtimes import Array, Runtime, find_runtime, make_runtime
from deploypipe.runtimes.named_arrays import feed
from deploypipe.target import Target
from deploypipe.task import Batch, Task, num_samples

Counts: TypeAlias = tuple[int, int]  # parameters, multiply-accumulates of one sample

_STAGE = "benchmark"


def compare_files(
    dense: ModelFile,
    compressed: ModelFile,
    *,
    folder: Path | str,
    test_batches: Iterable[Batch],
    task: Task,
    target: Target,
    counts: tuple[Counts, Counts],
    timed_on: Iterable[Batch] | None = None,
    notify: Notify = silent,
) -> BenchmarkReport:
    """Measure both files, timed interleaved; `counts` are (dense, compressed), the files' paths relative to `folder`.

    timed_on: latency and memory are measured on its first batch; by default on that of `test_batches`.

    If this machine lacks the target's runtime, every figure that needs it is None, and a note says why. Raises
    DataError for an empty split or one that does not fit the files, ModelError for a file that does not load.
    """
    environment = describe_environment(target.num_threads)
    files = (dense, compressed)
    try:
        runtime = find_runtime(target)
    except RuntimeUnavailableError as error:
        return BenchmarkReport(
            dense=unmeasured(dense, counts[0]),
            compressed=unmeasured(compressed, counts[1]),
            latency_ratio=None,
            accuracy_drop_pp=None,
            environment=environment,
            is_steady=False,
            notes=(f"nothing was measured: {error}",),
        )
    described = DescribedSplit(test_batches, task.slices)
    measured, timings, notes = _measure_all(
        files,
        folder=Path(folder),
        batches=described,
        timed_on=test_batches if timed_on is None else timed_on,
        task=task,
        target=target,
        counts=counts,
        runtime=runtime,
        notify=notify,
        minds_others=True,
    )
    names = ("dense", "compressed")
    doubts = find_doubts(timings, names, target.num_threads)
    first, second = measured
    return BenchmarkReport(
        dense=first,
        compressed=second,
        latency_ratio=interval_of_median_ratio(*timings.samples[::-1], block=timings.block),
        accuracy_drop_pp=interval_of_drop_pp(first.per_sample_metric, second.per_sample_metric),
        environment=environment,
        is_steady=not doubts,
        notes=(*doubts, *notes),
        conditions=conditions_of(timings, names, target.num_threads),
        slices=described.slices,
        test_data=described.digest,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def accuracy_here(paths: tuple[Path, Path], batches: Iterable[Batch], task: Task) -> AccuracyHere:
    """The accuracy of a dense and a compressed ONNX file on this machine's CPU, for a target that cannot run here.

    Raises ModelError for a file that does not load, DataError as `compare_files` does.
    """
    runtime = make_runtime(Target(runtime="onnxruntime"))
    dense, compressed = (evaluate_file(path, batches, task, runtime, num_threads=1) for path in paths)
    return AccuracyHere(
        dense=interval_of_mean(dense),
        compressed=interval_of_mean(compressed),
        drop_pp=interval_of_drop_pp(dense, compressed),
        num_samples=len(dense),
    )


def measure(
    file: ModelFile,
    *,
    folder: Path,
    batches: Iterable[Batch],
    timed_on: Iterable[Batch] | None = None,
    task: Task,
    target: Target,
    counts: Counts,
    notify: Notify = silent,
) -> Measurement:
    """Measure one file by the method of `compare_files`, for figures that no verdict depends on.

    Raises as `compare_files` does, and RuntimeUnavailableError without the runtime.
    """
    measured, *_ = _measure_all(
        (file,),
        folder=folder,
        batches=batches,
        timed_on=batches if timed_on is None else timed_on,
        task=task,
        target=target,
        counts=(counts,),
        runtime=find_runtime(target),
        notify=notify,
        minds_others=False,
    )
    return measured[0]


def first_batch(batches: Iterable[Batch], input_names: Iterable[str], batch_size: int) -> dict[str, Array]:
    """The inputs for measurements of latency and memory: the first `batch_size` samples of the first batch.

    They are repeated if the batch holds fewer. DataError for an empty split.
    """
    for inputs, _ in batches:
        size = num_samples(inputs)
        if not size:
            break
        arrays = feed(inputs, tuple(input_names))
        return {
            name: np.resize(a, (batch_size, *a.shape[1:])) if a.ndim and len(a) == size else a
            for name, a in arrays.items()
        }
    raise DataError("the split is empty; load_data() must return batches that can be read repeatedly")


def _measure_all(
    files: tuple[ModelFile, ...],
    *,
    folder: Path,
    batches: Iterable[Batch],
    timed_on: Iterable[Batch],
    task: Task,
    target: Target,
    counts: tuple[Counts, ...],
    runtime: Runtime,
    notify: Notify,
    minds_others: bool,
) -> tuple[list[Measurement], Timings, list[str]]:
    """Return measurements and latency samples in the order of `files`, and notes. Memory first: caches are cold then.

    minds_others: as in `time_steadily`.
    """
    paths = [folder / file.path for file in files]
    inputs = first_batch(timed_on, files[0].input_names, target.batch_size)
    notify(Progress(stage=_STAGE, message="memory"))
    peaks = [measure_peak_memory(path, inputs, target) for path in paths]
    notify(Progress(stage=_STAGE, message="accuracy"))
    metrics = [evaluate_file(path, batches, task, runtime, target.num_threads) for path in paths]
    if len(metrics[0]) < 2:
        raise DataError("the split has one sample, so no interval can be computed; give at least two")
    notify(Progress(stage=_STAGE, message="latency"))
    timings = time_steadily(paths, inputs, runtime, target, notify, minds_others)
    measured = [
        Measurement(
            file=file,
            num_params=num_params,
            num_macs=num_macs,
            latency=summarise(times, target, block=timings.block),
            peak_memory_mib=peak,
            per_sample_metric=tuple(metric.tolist()),
            accuracy=interval_of_mean(metric),
        )
        for file, (num_params, num_macs), times, (peak, _), metric in zip(
            files, counts, timings.samples, peaks, metrics, strict=True
        )
    ]
    return measured, timings, sorted({reason for _, reason in peaks if reason})


def unmeasured(file: ModelFile, counts: Counts) -> Measurement:
    """The record of a file that cannot run here: without any figure that depends on the device."""
    return Measurement(
        file=file,
        num_params=counts[0],
        num_macs=counts[1],
        latency=None,
        peak_memory_mib=None,
        per_sample_metric=(),
        accuracy=None,
    )
