"""Compare a run's file with that of a released bundle: both are timed here and now, in turns."""

from collections.abc import Sequence
from pathlib import Path

from deploypipe.benchmark.child_processes.run_child import try_file
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import conditions_of, find_doubts, summarise, time_steadily
from deploypipe.errors import DeploypipeError
from deploypipe.numerics.intervals import interval_of_drop_pp, interval_of_median_ratio
from deploypipe.records import BaselineComparison, Check, Interval, Status
from deploypipe.release.bundle import ENGINE, MODEL, check_run, load_bundle
from deploypipe.release.gate import doubted
from deploypipe.report.run_tables import what_is_covered
from deploypipe.runs.result import RunResult
from deploypipe.runtimes import find_runtime
from deploypipe.text.amounts import amount
from deploypipe.untrusted_files.limited_process import ProcessLimits
from deploypipe.verify import golden_inputs


def compare_with_baseline(run: Path | str, result: RunResult, bundle: Path | str) -> BaselineComparison:
    """Compare latency by a new interleaved run on one golden sample, and accuracy by the recorded paired results on the
    same test samples. A figure that cannot be compared is None, and a note gives the reason.

    Raises BundleError if the bundle was changed, or if the run's files are not those that it measured.
    """
    run, bundle = Path(run), Path(bundle)
    check_run(run)
    before = load_bundle(bundle)
    drop, why_no_drop = _accuracy_drop(before, result)
    ratio, why_no_ratio, doubts = _latency_ratio(run, result, bundle, before)
    notes = tuple(note for note in (why_no_drop, why_no_ratio) if note)
    return BaselineComparison(
        name=bundle.name, latency_ratio=ratio, accuracy_drop_pp=drop, notes=notes, latency_doubts=doubts
    )


def _accuracy_drop(before: RunResult, after: RunResult) -> tuple[Interval | None, str]:
    first, second = before.benchmark.compressed.per_sample_metric, after.benchmark.compressed.per_sample_metric
    if not first or not second:
        return None, "accuracy: one of the two was not measured"
    if before.benchmark.test_data != after.benchmark.test_data or before.metric != after.metric:
        return None, "accuracy: the test split or the metric differs from the baseline's"
    return interval_of_drop_pp(first, second), ""


def _latency_ratio(run: Path, result: RunResult, bundle: Path, before: RunResult) -> tuple[Interval | None, str, str]:
    """The ratio or None, the reason for None, and why the ratio cannot decide ("" if it can)."""
    files = [folder / (ENGINE if found.engine else MODEL) for folder, found in ((run, result), (bundle, before))]
    try:
        runtime = find_runtime(result.target)
        inputs = golden_inputs(run, result.target.batch_size)
        try_file(files[1], inputs, result.target, ProcessLimits())  # it comes from elsewhere
        timings = time_steadily(files, inputs, runtime, result.target)
    except DeploypipeError as error:
        return None, f"latency: {error}", ""
    ratio = interval_of_median_ratio(*timings.samples, block=timings.block)
    return ratio, "", _joined(find_doubts(timings, ("this run's file", "the baseline's"), result.target.num_threads))


def _joined(doubts: Sequence[str]) -> str:
    return f"the timings were not steady: {'; '.join(doubts)}" if doubts else ""


def check_approved_latency(bundle: Path) -> Check:
    """Time the bundle's model here and compare with its approved latency, within its target's `latency_regression`.

    PASS if the whole interval is within the limit, FAIL if all of it is above. UNKNOWN if the limit lies in the
    interval, if the machine was throttled or noisy, or on another device than that of the approval. Raises BundleError
    if the bundle was changed.
    """
    approved = load_bundle(bundle)
    target, before = approved.target, approved.benchmark.compressed.latency
    device = approved.benchmark.environment.device_fingerprint
    name = "approved_latency"
    if before is None or describe_environment(target.num_threads).device_fingerprint != device:
        why = "no latency was approved" if before is None else "it was approved on another device than this one"
        return Check(name=name, status=Status.UNKNOWN, measured=None, interval=None, limit=None, unit="ms", reason=why)
    limit = before.p50_ms.high * target.budget.latency_regression
    file = bundle / (ENGINE if approved.engine else MODEL)
    inputs, runtime = golden_inputs(bundle, target.batch_size), find_runtime(target)
    try_file(file, inputs, target, ProcessLimits())
    timings = time_steadily([file], inputs, runtime, target)
    now = summarise(timings.samples[0], target, block=timings.block).p50_ms
    reason = f"approved {amount(before.p50_ms.value, 'ms')}, now {amount(now.value, 'ms')}"
    status = Status.PASS if now.high <= limit else Status.FAIL
    if now.low <= limit < now.high:
        status, reason = Status.UNKNOWN, f"{reason}: the limit lies within the interval; measure again"
    seen = conditions_of(timings, [file.name], target.num_threads)
    reason = f"{reason}; {what_is_covered(seen)}"
    check = Check(name=name, status=status, measured=now.value, interval=now, limit=limit, unit="ms", reason=reason)
    return doubted(check, _joined(find_doubts(timings, [file.name], target.num_threads)))
