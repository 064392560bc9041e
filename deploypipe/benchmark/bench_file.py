"""`deploypipe bench`: measure a model file on a target in every respect, with the evidence for each figure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deploypipe.benchmark.bench_results import (
    BenchResult,
    ColdStart,
    Comparison,
    FileFigures,
    InputArray,
    LatencyFigures,
)
from deploypipe.benchmark.child_processes.run_child import run_child, try_file
from deploypipe.benchmark.conditions import judge_conditions, read_state
from deploypipe.benchmark.energy import find_meter, measure_energy
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.input_batches import check_inputs, has_open_batch, load_inputs, make_inputs, read_specs
from deploypipe.benchmark.latency import Timings, conditions_of, percentile, time_loaded, time_steadily
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.benchmark.operator_times import profile_layers
from deploypipe.benchmark.sweeps import (
    MAX_BATCH,
    batch_sizes,
    count_cores,
    sweep_batches,
    sweep_threads,
    thread_counts,
)
from deploypipe.benchmark.timed_runs import time_parts
from deploypipe.errors import ConfigError, DataError
from deploypipe.files.hashing import file_sha256
from deploypipe.numerics.intervals import interval_of_median_ratio, interval_of_quantile
from deploypipe.records import Conditions, Finished, Interval, Notify, Progress, Started, silent
from deploypipe.runtimes import Array, Runtime, find_runtime
from deploypipe.target import Target
from deploypipe.text.field_bounds import shown
from deploypipe.untrusted_files.limited_process import ProcessLimits
from deploypipe.untrusted_files.onnx_file_check import size_with_data

PARTS = ("latency", "memory", "cold start", "layers", "batches", "threads", "energy")
MIN_SAMPLES = 80  # four openings of a file
MAX_BENCH_SAMPLES = 10_000_000
_NUM_COLD_STARTS = 5
_NUM_PARTED = 200  # runs on a GPU whose parts are timed
_LIMITS = ProcessLimits()
_ONNX = "onnxruntime"

Found = dict[str, Any]  # fields of FileFigures


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """The settings and files that all parts of a benchmark share."""

    paths: tuple[Path, ...]  # the file, and what it is compared with
    inputs: dict[str, Array]
    target: Target
    runtime: Runtime
    num_cpus: int
    has_open_batch: bool
    trust_program: bool
    limits: ProcessLimits
    refused: Mapping[Path, Mapping[int, str]]  # file -> batch size -> why it cannot be run
    notify: Notify


def bench_file(
    path: Path,
    target: Target,
    against: Path | None = None,
    inputs: Path | Mapping[str, Array] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    parts: Sequence[str] = PARTS,
    num_samples: int | None = None,
    trust_program: bool = False,
    limits: ProcessLimits = _LIMITS,
    notify: Notify = silent,
) -> BenchResult:
    """Measure `path` on the target. If `against` is given, both files are timed interleaved.

    inputs: one batch, as arrays or an .npz or .safetensors file. Without it values are random, with the target's batch
    size. shapes: by input, for inputs with other axes of any size. num_samples: timed runs of each file; the default is
    about two seconds of them, and at least the target's number. parts: some of `PARTS`; a part that cannot be measured
    here is missing with its reason. trust_program: open a .pt2 program, which can run any code. Each file is first
    loaded and run in a process of its own, within `limits`.

    Raises ModelError for files that are absent, damaged or do not run; DataError for inputs that do not fit;
    ConfigError for unknown parts or too few samples; RuntimeUnavailableError if this machine cannot run the target.
    """
    _check_request(parts, num_samples)
    runtime = find_runtime(target, trust_program=trust_program)
    paths = (path,) if against is None else (path, against)
    batch, is_open, source = _find_inputs(paths, target, inputs, shapes or {})
    sizes = {array.shape[:1] for array in batch.values()}
    is_shared = len(sizes) == 1 and () not in sizes
    batch_size = min(sizes)[0] if is_shared else target.batch_size
    environment = describe_environment(target.num_threads)
    has_batches = is_open and is_shared
    swept = _sweep_sizes(target) if has_batches and "batches" in parts else []
    refused = {
        file: try_file(file, batch, target, limits, batch_sizes=swept, trust_program=trust_program) for file in paths
    }
    job = _Job(
        paths=paths,
        inputs=batch,
        target=target,
        runtime=runtime,
        num_cpus=environment.num_cpus,
        has_open_batch=has_batches,
        trust_program=trust_program,
        limits=limits,
        refused=refused,
        notify=notify,
    )
    before = read_state()
    found: list[Found] = [{"missing": {}} for _ in paths]
    timings = None
    for part in PARTS:
        if part in parts:
            with _stage(part, notify):
                if part == "latency":
                    timings = _time(job, batch_size, num_samples, found)
                else:
                    _MEASURES[part](job, batch_size, found)
    ratio = interval_of_median_ratio(*timings.samples, block=timings.block) if timings and against else None
    names = [path.name for path in paths]
    while_timing = conditions_of(timings, names, target.num_threads) if timings else None
    conditions = while_timing or judge_conditions(
        before, read_state(), num_cpus=environment.num_cpus, num_threads=target.num_threads, unsteady=()
    )
    figures = [_describe(file, figures) for file, figures in zip(paths, found, strict=True)]
    return BenchResult(
        target=target.name,
        runtime=target.runtime,
        batch_size=batch_size,
        num_threads=target.num_threads,
        inputs=tuple(
            InputArray(name=name, dtype=str(array.dtype), shape=array.shape, source=source)
            for name, array in batch.items()
        ),
        file=figures[0],
        against=figures[1] if against else None,
        latency_ratio=ratio,
        comparison=compare(ratio, conditions) if ratio else None,
        conditions=conditions,
        environment=environment,
        notes=_notes(target, batch_size, ratio, figures),
    )


def compare(ratio: Interval, conditions: Conditions | None = None) -> Comparison:
    """Compare two latencies by the interval of their ratio; "unknown" if the machine was throttled or noisy."""
    if conditions and conditions.verdict != "steady":
        return "unknown"
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "no difference"


# --- the request ------------------------------------------------------------------------------------------------------


def _check_request(parts: Sequence[str], num_samples: int | None) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConfigError("--parts", ", ".join(unknown), "no such part", f"choose from: {', '.join(PARTS)}")
    if num_samples is not None and num_samples < MIN_SAMPLES:
        raise ConfigError("--samples", str(num_samples), "too few for an interval", f"ask for {MIN_SAMPLES} or more")
    if num_samples is not None and num_samples > MAX_BENCH_SAMPLES:
        raise ConfigError("--samples", shown(num_samples), "too many", f"ask for {MAX_BENCH_SAMPLES:,} or fewer")


def _find_inputs(
    paths: Sequence[Path],
    target: Target,
    given: Path | Mapping[str, Array] | None,
    shapes: Mapping[str, Sequence[int]],
) -> tuple[dict[str, Array], bool, str]:
    """Return the batch, whether its size may change, and its source. Every ONNX file must accept it."""
    if target.runtime != _ONNX:
        if given is None:
            raise DataError(f"{paths[0]}: only ONNX files declare their inputs; give the batch with --inputs FILE")
        return (load_inputs(given) if isinstance(given, Path) else dict(given)), True, _source(given)
    specs = [read_specs(path) for path in paths]
    if given is None:
        batch = make_inputs(paths[0], specs[0], target.batch_size, shapes)
    else:
        if shapes:
            raise ConfigError(
                "--shape", ", ".join(shapes), "the given inputs have their own shapes", "give --shape or --inputs"
            )
        batch = load_inputs(given) if isinstance(given, Path) else dict(given)
    for path, spec in zip(paths, specs, strict=True):
        check_inputs(path, spec, batch)
    return batch, all(has_open_batch(spec) for spec in specs), _source(given)


def _source(given: Path | Mapping[str, Array] | None) -> str:
    if given is None:
        return "random"
    return str(given) if isinstance(given, Path) else "arrays"


# --- the parts --------------------------------------------------------------------------------------------------------


@contextmanager
def _stage(name: str, notify: Notify) -> Iterator[None]:
    notify(Started(stage=name))
    yield
    notify(Finished(stage=name))


def _time(job: _Job, batch_size: int, num_samples: int | None, found: list[Found]) -> Timings:
    timings = time_steadily(job.paths, job.inputs, job.runtime, job.target, job.notify, num_samples=num_samples)
    for figures, samples in zip(found, timings.samples, strict=True):
        p50 = interval_of_quantile(samples, 0.5, block=timings.block)
        figures["latency"] = LatencyFigures(
            p50_ms=p50,
            p90_ms=percentile(samples, 0.9, block=timings.block),
            p99_ms=percentile(samples, 0.99, block=timings.block),
            throughput=1e3 * batch_size / p50.value,
            block=timings.block,
            samples_ms=tuple(samples.tolist()),
        )
    if job.target.needs_gpu:
        for path, figures in zip(job.paths, found, strict=True):
            with job.runtime.open(path, num_threads=job.target.num_threads) as session:
                figures["gpu"] = time_parts(session, job.inputs, _NUM_PARTED)
    return timings


def _weigh(job: _Job, batch_size: int, found: list[Found]) -> None:
    for path, figures in zip(job.paths, found, strict=True):
        figures["peak_memory_mib"], reason = measure_peak_memory(
            path, job.inputs, job.target, trust_program=job.trust_program, limits=job.limits
        )
        if reason:
            figures["missing"]["memory"] = reason


def _start(job: _Job, batch_size: int, found: list[Found]) -> None:
    for path, figures in zip(job.paths, found, strict=True):
        lines = run_child(
            "cold_start_child.py",
            path,
            job.inputs,
            job.target,
            repeats=_NUM_COLD_STARTS,
            what="cold start",
            trust_program=job.trust_program,
            limits=job.limits,
        )
        imports, loads, runs = zip(*(map(float, line.split()) for line in lines), strict=True)
        totals = sorted(load + run for load, run in zip(loads, runs, strict=True))
        figures["cold_start"] = ColdStart(
            import_ms=median(imports),
            load_ms=median(loads),
            first_run_ms=median(runs),
            total_ms=(totals[0], median(totals), totals[-1]),
            repeats=len(lines),
        )


def _profile(job: _Job, batch_size: int, found: list[Found]) -> None:
    for path, figures in zip(job.paths, found, strict=True):
        if job.target.runtime == _ONNX:
            figures["layers"] = profile_layers(path, job.inputs, job.target)
        else:
            figures["missing"]["layers"] = f"{job.target.runtime} is not profiled; see the engine's own layer table"


def _sweep_batches(job: _Job, batch_size: int, found: list[Found]) -> None:
    sizes = _sweep_sizes(job.target)
    for path, figures in zip(job.paths, found, strict=True):
        if not job.has_open_batch:
            figures["missing"]["batches"] = "the inputs do not share a first axis that may have any size"
            continue
        points = sweep_batches(path, job.inputs, job.runtime, job.target, sizes, job.refused[path])
        figures["batches"] = _watched(points, "batches", len(sizes), job.notify)


def _sweep_sizes(target: Target) -> list[int]:
    least, _, most = target.batches
    return batch_sizes(least, min(most, MAX_BATCH)) if target.runtime != _ONNX else batch_sizes()


def _sweep_threads(job: _Job, batch_size: int, found: list[Found]) -> None:
    counts = thread_counts(count_cores(job.num_cpus))
    for path, figures in zip(job.paths, found, strict=True):
        if job.target.needs_gpu:
            figures["missing"]["threads"] = "the GPU does the work"
            continue
        points = sweep_threads(path, job.inputs, job.runtime, batch_size, counts)
        figures["threads"] = _watched(points, "threads", len(counts), job.notify)


def _meter(job: _Job, batch_size: int, found: list[Found]) -> None:
    meter, reason = find_meter(job.target)
    for path, figures in zip(job.paths, found, strict=True):
        if meter is None:
            figures["missing"]["energy"] = reason
            continue
        with job.runtime.open(path, num_threads=job.target.num_threads) as session:
            time_loaded(session, job.inputs, seconds=0.1, least=3, most=20)  # warm
            figures["energy"] = measure_energy(session, job.inputs, meter)


_MEASURES: dict[str, Callable[[_Job, int, list[Found]], None]] = {
    "memory": _weigh,
    "cold start": _start,
    "layers": _profile,
    "batches": _sweep_batches,
    "threads": _sweep_threads,
    "energy": _meter,
}


def _watched(points: Iterator[Any], stage: str, total: int, notify: Notify) -> tuple[Any, ...]:
    seen = []
    for point in points:
        seen.append(point)
        notify(Progress(stage=stage, done=len(seen), total=total))
    return tuple(seen)


# --- the result -------------------------------------------------------------------------------------------------------


def _describe(path: Path, figures: Found) -> FileFigures:
    return FileFigures(
        path=str(path),
        sha256=file_sha256(path),
        size_bytes=size_with_data(path),
        **figures,
    )


def _notes(target: Target, batch_size: int, ratio: Interval | None, figures: Sequence[FileFigures]) -> tuple[str, ...]:
    notes = []
    if batch_size != target.batch_size:
        notes.append(f"the batch is {batch_size}, and the target's batch_size {target.batch_size}")
    if ratio and compare(ratio) == "no difference":
        resolution = max(ratio.high / ratio.value, ratio.value / ratio.low) - 1
        notes.append(f"differences below about {resolution:.1%} could not be detected; more --samples lower that")
    if len(figures) > 1 and (figures[0].batches or figures[0].threads):
        notes.append("batch sizes and threads are timed one file after the other: compare files by their latencies")
    return tuple(notes)
