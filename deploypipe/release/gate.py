"""Whether the compressed model may ship. Pure: a report and a budget in, a decision out."""

import math

from deploypipe.records import BenchmarkReport, Check, GateDecision, Interval, Measurement, Status, Verdict
from deploypipe.target import Budget, Limit

_MIB = 2**20
_UNITS = {"latency_p50": "ms", "peak_memory": "MiB", "file_size": "MiB", "params": "", "macs": ""}


def decide(report: BenchmarkReport, budget: Budget) -> GateDecision:
    """One check for every limit that is set, and one for the accuracy. SHIP only where every check passed.

    Latency and accuracy pass when the upper end of their interval does: a relative latency by the ratio of the
    interleaved run, an absolute one by the median's interval, the accuracy by the paired drop. What was not measured,
    or was measured on an unsteady machine, is UNKNOWN.
    """
    checks = tuple(
        _check_latency(report, limit) if name == "latency_p50" else _check_figure(report, name, limit)
        for name, limit in budget.limits().items()
    )
    checks += (_check_accuracy(report, budget.accuracy_drop_pp),)
    is_dense = report.dense.file.sha256 == report.compressed.file.sha256
    unchanged = "the dense model is within the budget as it is, nothing was removed; " if is_dense else ""
    blocking = [check for check in checks if check.status is not Status.PASS]
    if not blocking:
        passed = f"all {len(checks)} checks passed" if len(checks) > 1 else "the only check passed"
        return GateDecision(verdict=Verdict.SHIP, checks=checks, reason=unchanged + passed)
    told = "; ".join(f"{check.name} {_VERBS[check.status]} ({check.reason})" for check in blocking)
    return GateDecision(verdict=Verdict.HOLD, checks=checks, reason=unchanged + told)


_VERBS = {Status.FAIL: "failed", Status.UNKNOWN: "is unknown"}


def _check_latency(report: BenchmarkReport, limit: Limit) -> Check:
    name, unit = "latency_p50", _UNITS["latency_p50"]
    before, after, ratio = report.dense.latency, report.compressed.latency, report.latency_ratio
    if after is None or (limit.is_relative and (before is None or ratio is None)):
        return _unknown(name, unit, None if limit.is_relative else limit.value, _not_measured(report))
    if limit.is_relative and before is not None and ratio is not None:
        scale = before.p50_ms.value
        bound, interval, unit_free = limit.value * scale, _scaled(ratio, scale), ratio.high
    else:
        bound, interval, unit_free = limit.value, after.p50_ms, after.p50_ms.high
    if not report.is_steady:
        why = "; ".join(report.notes) or "no reason was recorded"
        return _unknown(name, unit, bound, f"the timings were not steady: {why}")
    # The comparison is made in the limit's own terms: scaling both sides could round a tie either way.
    return _judged(name, unit, bound, interval.value, interval, is_met=unit_free <= limit.value)


def _check_figure(report: BenchmarkReport, name: str, limit: Limit) -> Check:
    before, after = _figure(report.dense, name), _figure(report.compressed, name)
    if after is None or (limit.is_relative and before is None):
        return _unknown(name, _UNITS[name], None if limit.is_relative else limit.value, _not_measured(report))
    bound = limit.absolute(before or 0.0)
    return _judged(name, _UNITS[name], bound, after, None, is_met=after <= bound)


def _check_accuracy(report: BenchmarkReport, limit_pp: float) -> Check:
    drop = report.accuracy_drop_pp
    if drop is None:
        return _unknown("accuracy_drop", "pp", limit_pp, _not_measured(report))
    return _judged("accuracy_drop", "pp", limit_pp, drop.value, drop, is_met=drop.high <= limit_pp)


def _figure(measurement: Measurement, name: str) -> float | None:
    figures: dict[str, float | None] = {
        "peak_memory": measurement.peak_memory_mib,
        "file_size": measurement.file.size_bytes / _MIB,
        "params": measurement.num_params,
        "macs": measurement.num_macs,
    }
    return figures[name]


def _judged(name: str, unit: str, limit: float, measured: float, interval: Interval | None, *, is_met: bool) -> Check:
    decisive = interval.high if interval else measured
    if not (math.isfinite(decisive) and math.isfinite(limit)):
        return _unknown(name, unit, None, "the measurement is not a finite number")
    said = _amount(decisive, unit)
    if interval:
        said = f"the upper end of its interval, {said},"
    relation = "is within" if is_met else "is above"
    return Check(
        name=name,
        status=Status.PASS if is_met else Status.FAIL,
        measured=measured,
        interval=interval,
        limit=limit,
        unit=unit,
        reason=f"{said} {relation} the limit of {_amount(limit, unit)}",
    )


def _unknown(name: str, unit: str, limit: float | None, reason: str) -> Check:
    return Check(name=name, status=Status.UNKNOWN, measured=None, interval=None, limit=limit, unit=unit, reason=reason)


def _not_measured(report: BenchmarkReport) -> str:
    return "; ".join(("it was not measured", *report.notes))


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(
        value=interval.value * factor,
        low=interval.low * factor,
        high=interval.high * factor,
        confidence=interval.confidence,
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}" if unit else f"{value:,.0f}"
