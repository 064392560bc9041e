"""Decide whether the compressed model may ship: a pure function of a report and a budget."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from deploypipe.budgets import BUDGETS, BudgetRow
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.records import (
    BaselineComparison,
    BenchmarkReport,
    Check,
    GateDecision,
    Interval,
    Status,
    Verdict,
    Waiver,
)
from deploypipe.release.waivers import waived
from deploypipe.report.run_tables import what_is_covered
from deploypipe.target import RELATIVE, Budget, Limit
from deploypipe.text.amounts import NO_LIMIT, amount, limit_text
from deploypipe.verification.golden_json import shown

FAST_DEV_RUN = "fast_dev_run"  # a check that no waiver settles
_MIN_OF_A_SLICE = 2  # samples; one says nothing about others like it
_MAX_CLOCK_DIFFERENCE_DAYS = 0.05  # between two machines


def decide(
    report: BenchmarkReport,
    budget: Budget,
    *,
    parity_limit: float | None = None,
    baseline: BaselineComparison | None = None,
    waivers: Sequence[Waiver] = (),
    now: datetime | None = None,
    fast_dev_run: bool = False,
) -> GateDecision:
    """Check the accuracy and every limit that is set. The verdict is SHIP if each check passed or is waived.

    A figure with an interval passes if the upper end does. A relative latency is decided by, and stated as, the ratio
    of the interleaved run, an absolute one by the median's interval, the accuracy by the paired drop. A figure that was
    not measured is UNKNOWN, and so is a time taken while the machine was throttled, noisy or unsteady.

    parity_limit: for the file's error against the network's outputs, relative to the largest output.
    baseline: the previous release, which the model must not be worse than.
    now: time of the decision, timezone aware; by default that of the measurement.
    fast_dev_run: the run only tried whether every stage works. It is on HOLD, whatever is waived.
    """
    measured = datetime.fromisoformat(report.measured_at) if report.measured_at else None
    now = now or measured or datetime.now(UTC)
    checks = [_check_budget(report, BUDGETS[name], limit) for name, limit in budget.limits().items()]
    checks.append(_check_accuracy(report, budget.accuracy_drop_pp))
    if parity_limit is not None:
        checks.append(_check_parity(report.compressed.file.max_abs_error, parity_limit))
    if budget.slice_drop_pp is not None:
        checks.append(_check_slices(report, budget.slice_drop_pp))
    if budget.max_age_days is not None:
        checks.append(_check_age(measured, now, budget.max_age_days))
    if baseline is not None:
        checks += _check_regression(baseline, budget)
    decided = waived(checks, waivers, now.date())
    if fast_dev_run:
        reason = "fast development run: it tried the stages, and shows nothing"
        decided = (*decided, _unknown(FAST_DEV_RUN, "", None, reason))
    is_dense = report.dense.file.identity == report.compressed.file.identity
    unchanged = "the dense model is within the budget as it is, nothing was removed; " if is_dense else ""
    return GateDecision(
        verdict=Verdict.SHIP if all(check.is_settled for check in decided) else Verdict.HOLD,
        checks=decided,
        reason=unchanged + _reason(decided),
    )


def _reason(checks: Sequence[Check]) -> str:
    blocking: dict[tuple[Status, str], list[str]] = {}
    for check in checks:
        if not check.is_settled:
            blocking.setdefault((check.status, check.reason), []).append(check.name)
    if blocking:
        return "; ".join(f"{_state(names, status)} ({reason})" for (status, reason), names in blocking.items())
    excused = [_state([check.name], check.status) for check in checks if check.status is not Status.PASS]
    passed = len(checks) - len(excused)
    if excused:
        return f"{passed} of {len(checks)} checks passed, the rest is waived: {'; '.join(excused)}"
    return f"all {passed} checks passed" if passed > 1 else "the only check passed"


def _state(names: Sequence[str], status: Status) -> str:
    if status is Status.FAIL:
        return f"{', '.join(names)} failed"
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} unknown"


def _check_budget(report: BenchmarkReport, row: BudgetRow, limit: Limit) -> Check:
    """Check one budget's figure, in the limit's own terms: scaling both sides could round a tie either way."""
    dense, figure = row.value(report.dense), row.of_measurement(report.compressed)
    ratio = row.ratio(report) if row.ratio else None
    if figure is None or (limit.is_relative and (dense is None or (row.ratio and ratio is None))):
        return _not_comparable(row, report, limit)
    if limit.bounds_nothing:
        free = _unknown(row.name, row.unit, None, NO_LIMIT)
        return replace(free, status=Status.PASS, measured=row.value(report.compressed))
    bound = limit.absolute(dense or 0.0)
    if limit.is_relative and ratio:
        check = _compare(row.name, RELATIVE, limit.value, ratio.value, ratio, is_met=ratio.high <= limit.value)
    elif isinstance(figure, Interval):
        check = _compare(row.name, row.unit, bound, figure.value, figure, is_met=figure.high <= bound)
    else:
        check = _compare(row.name, row.unit, bound, figure, None, is_met=figure <= bound)
    if row.source != "timed":
        return check
    if not limit.is_relative:
        check = replace(check, reason=f"{check.reason}; {what_is_covered(report.conditions)}")
    return doubted(check, report.doubts)


def _check_accuracy(report: BenchmarkReport, limit_pp: float) -> Check:
    drop = report.accuracy_drop_pp
    if drop is None:
        return _unknown("accuracy_drop", "pp", limit_pp, _not_measured(report))
    check = _compare("accuracy_drop", "pp", limit_pp, drop.value, drop, is_met=drop.high <= limit_pp)
    return replace(check, reason=check.reason + _why_too_few(check, report.dense.per_sample_metric))


def _check_parity(error: float, limit: float) -> Check:
    return _compare("parity", "relative", limit, error, None, is_met=error <= limit)


def _check_slices(report: BenchmarkReport, limit_pp: float) -> Check:
    """Check the slice with the highest upper end. UNKNOWN if it passes, but other slices have too few samples."""
    name, unit = "slice_drop", "pp"
    dense, compressed = report.dense.per_sample_metric, report.compressed.per_sample_metric
    if not (report.slices and dense and compressed):
        why = _not_measured(report) if report.slices else "the pipeline's task names no slices"
        return _unknown(name, unit, limit_pp, why)
    metrics = {
        slice_name: ([dense[i] for i in numbers], [compressed[i] for i in numbers])
        for slice_name, numbers in report.slices.items()
        if len(numbers) >= _MIN_OF_A_SLICE
    }
    few = sorted(report.slices.keys() - metrics.keys())
    too_few = f"fewer than {_MIN_OF_A_SLICE} test samples in {shown(few)}" if few else ""
    if not metrics:
        return _unknown(name, unit, limit_pp, too_few)
    drops = {slice_name: interval_of_drop_pp(*pair) for slice_name, pair in metrics.items()}
    worst = max(drops, key=lambda slice_name: drops[slice_name].high)
    failed = sum(drop.high > limit_pp for drop in drops.values())
    check = _compare(name, unit, limit_pp, drops[worst].value, drops[worst], is_met=failed == 0)
    detail = f"{worst} ({len(report.slices[worst]):,} samples): {check.reason}{_why_too_few(check, metrics[worst][0])}"
    reason = "; ".join(filter(None, (detail, f"{failed} of {len(drops)} slices are above it", too_few)))
    is_unknown = bool(few) and check.status is Status.PASS
    return replace(check, reason=reason, status=Status.UNKNOWN if is_unknown else check.status)


def _why_too_few(failed: Check, metric: Sequence[float]) -> str:
    """Say how many samples it takes, if even a network without any loss would fail."""
    if failed.status is not Status.FAIL or not metric or failed.limit is None or failed.limit <= 0:
        return ""
    least = interval_of_drop_pp(metric, metric).high
    if least <= failed.limit:
        return ""
    wanted = math.ceil(len(metric) * least / failed.limit)
    return f"; {len(metric):,} samples are too few: even without any loss it takes about {wanted:,}"


def _check_age(measured: datetime | None, now: datetime, max_days: float) -> Check:
    if measured is None:
        return _unknown("age", "days", max_days, "the time of the measurement is not recorded")
    days = (now - measured).total_seconds() / 86_400
    if days < -_MAX_CLOCK_DIFFERENCE_DAYS:
        return _unknown("age", "days", max_days, f"the measurement is dated in the future, {measured}; check the clock")
    return _compare("age", "days", max_days, max(days, 0.0), None, is_met=days <= max_days)


def _check_regression(baseline: BaselineComparison, budget: Budget) -> list[Check]:
    why = "; ".join(("it was not compared", *baseline.notes))
    pairs = (
        ("latency_against_baseline", "x", budget.latency_regression, baseline.latency_ratio),
        ("accuracy_against_baseline", "pp", budget.accuracy_drop_pp, baseline.accuracy_drop_pp),
    )
    checks = []
    for name, unit, limit, interval in pairs:
        if interval is None:
            checks.append(_unknown(name, unit, limit, f"{baseline.name}: {why}"))
            continue
        check = _compare(name, unit, limit, interval.value, interval, is_met=interval.high <= limit)
        if unit == "x":
            check = doubted(check, baseline.latency_doubts)
        checks.append(replace(check, reason=f"compared with {baseline.name}: {check.reason}"))
    return checks


def doubted(check: Check, doubts: str) -> Check:
    """Turn a check UNKNOWN if its figure is in doubt; the figure, its interval and the limit stay."""
    return replace(check, status=Status.UNKNOWN, reason=doubts) if doubts else check


def _compare(name: str, unit: str, limit: float, measured: float, interval: Interval | None, *, is_met: bool) -> Check:
    decisive = interval.high if interval else measured
    if not (math.isfinite(decisive) and math.isfinite(limit)):
        return _unknown(name, unit, None, "the measurement is not a finite number")
    upper_end, bound = amount(decisive, unit), limit_text(limit, unit)
    subject = f"the upper end of its interval, {upper_end}," if interval else upper_end
    relation = "is within" if is_met else "is just above" if limit_text(decisive, unit) == bound else "is above"
    return Check(
        name=name,
        status=Status.PASS if is_met else Status.FAIL,
        measured=measured,
        interval=interval,
        limit=limit,
        unit=unit,
        reason=f"{subject} {relation} the limit of {bound}",
    )


def _unknown(name: str, unit: str, limit: float | None, reason: str) -> Check:
    return Check(name=name, status=Status.UNKNOWN, measured=None, interval=None, limit=limit, unit=unit, reason=reason)


def _not_measured(report: BenchmarkReport) -> str:
    return "; ".join(("it was not measured", *report.notes))


def _not_comparable(row: BudgetRow, report: BenchmarkReport, limit: Limit) -> Check:
    """A figure that was not measured, or whose limit is a share of a dense figure that was not measured."""
    measured = row.value(report.compressed)
    if measured is None:
        return _unknown(row.name, RELATIVE if limit.is_relative else row.unit, limit.value, _not_measured(report))
    why = "; ".join(("the dense network's figure was not measured, and the limit is relative to it", *report.notes))
    return replace(_unknown(row.name, row.unit, None, why), measured=measured)
