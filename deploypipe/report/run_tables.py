"""The figures of a run as table rows, the same for the terminal, the report and the comment on a pull request."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from deploypipe.budgets import BUDGETS, BudgetRow
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.records import (
    BenchmarkReport,
    Check,
    Conditions,
    Converted,
    Interval,
    Measurement,
    PrecisionChoice,
    RepairReport,
    Waiver,
)
from deploypipe.runs.result import RunResult
from deploypipe.text.amounts import NO_LIMIT, amount, bounded, limit_text, mebibytes

NOT_MEASURED = "not measured"
HERE = "on this machine, not on the device"


class Row(NamedTuple):
    """One figure of the dense and of the compressed network."""

    name: str
    dense: str
    compressed: str
    change: str


def before_after(result: RunResult) -> tuple[Row, ...]:
    """Compare the dense and the compressed network: the accuracy, then every budget's figure."""
    return (_accuracy_row(result), *(_budget_row(budget, result.benchmark) for budget in BUDGETS.values()))


def _accuracy_row(result: RunResult) -> Row:
    """The accuracy on the device; else that on the machine of the run, which the last cell says."""
    report, here = result.benchmark, result.benchmark.accuracy_here
    if here:
        dense, compressed = (_percent(accuracy, here.num_samples) for accuracy in (here.dense, here.compressed))
        change = f"{_change_in_pp(here.drop_pp)} {HERE}"
    else:
        dense, compressed = _accuracy(report.dense), _accuracy(report.compressed)
        change = "" if report.accuracy_drop_pp is None else _change_in_pp(report.accuracy_drop_pp)
    return Row(name=result.metric, dense=dense, compressed=compressed, change=change)


def overview_header() -> tuple[str, ...]:
    return ("target", "decision", "metric", *_overview_labels(), "why")


def overview_rows(results: Mapping[str, RunResult | str]) -> list[tuple[str, ...]]:
    """One row for each target: what ships against the dense network, or the error that ended the run."""
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        if isinstance(result, str):
            rows.append((name, "ERROR", "", *("" for _ in _overview_labels()), result))
            continue
        changes = {row.name: row.change for row in before_after(result)}
        shown = (changes[key] for key in (result.metric, *_overview_labels()))
        rows.append((name, result.decision.verdict.value, *shown, result.decision.reason))
    return rows


COMPARISON_HEADER = ("", "first", "second", "second / first")


def comparison_rows(first: RunResult, second: RunResult) -> list[tuple[str, ...]]:
    """Compare what two runs ship, figure by figure.

    Accuracies are paired if both were tested on the same samples. Latencies were timed apart: their quotient is shown
    for one device only, and says less than an interleaved ratio.
    """
    before, after = first.benchmark, second.benchmark
    rows = {row.name: row.compressed for row in before_after(first)}
    others = {row.name: row.compressed for row in before_after(second)}
    same_device = before.environment.device_fingerprint == after.environment.device_fingerprint
    quotients = {
        budget.label: _quotient(budget.value(before.compressed), budget.value(after.compressed))
        + (", timed apart" if budget.source == "timed" else "")
        for budget in BUDGETS.values()
        if same_device or budget.source == "counted"
    }
    metrics = (before.compressed.per_sample_metric, after.compressed.per_sample_metric)
    if before.test_data and before.test_data == after.test_data and first.metric == second.metric and all(metrics):
        drop = interval_of_drop_pp(*metrics)
        quotients[first.metric] = _change_in_pp(drop)
    return [
        ("decision", first.decision.verdict.value, second.decision.verdict.value, ""),
        *((name, rows.get(name, ""), others.get(name, ""), quotients.get(name, "")) for name in {**rows, **others}),
    ]


def _overview_labels() -> list[str]:
    return [budget.label for budget in BUDGETS.values() if budget.is_in_overview]


def _quotient(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NOT_MEASURED
    return amount(after / before, "x") if before else ""


def check_cells(check: Check) -> tuple[str, str, str, str, str]:
    """Return name, status, measured figure, limit and reason of one check."""
    return (
        check.name.replace("_", " "),
        str(check.status.value),
        NOT_MEASURED if check.measured is None else interval_text(check.measured, check.interval, check.unit),
        _limit_cell(check),
        check.reason if check.waiver is None else f"{check.reason}; {_waived(check.waiver)}",
    )


def _limit_cell(check: Check) -> str:
    if check.limit is None:
        return NO_LIMIT if check.reason == NO_LIMIT else ""
    return limit_text(check.limit, check.unit)


class CheckRow(NamedTuple):
    """One check in a page's table. Neighbours with the same reason share its cell."""

    cells: tuple[str, str, str, str]  # name, status, measured, limit
    reason: str
    num_rows: int  # that the cell of the reason covers; 0: that of a row above does


def check_rows(checks: Sequence[Check]) -> list[CheckRow]:
    """The gate's checks; those that do not pass are first, and a reason is stated once."""
    ordered = sorted(checks, key=lambda check: check.is_settled)
    groups = [list(group) for _, group in groupby(map(check_cells, ordered), key=lambda cells: cells[4])]
    return [
        CheckRow(cells=(name, status, measured, limit), reason=reason, num_rows=0 if i else len(group))
        for group in groups
        for i, (name, status, measured, limit, reason) in enumerate(group)
    ]


def what_is_covered(conditions: Conditions | None) -> str:
    """Say which drifts the interval of an absolute latency includes."""
    lasted = f", {conditions.after.at_s - conditions.before.at_s:.0f} s" if conditions else ""
    return (
        f"the interval covers this machine's median under drifts as slow as the measurement{lasted}, "
        "not those from day to day"
    )


def _waived(waiver: Waiver) -> str:
    return f"WAIVED by {waiver.by} from {waiver.granted} to {waiver.expires}: {waiver.reason}"


def repair_remarks(report: RepairReport) -> list[tuple[str, str]]:
    """One row for each reason why layers were not repaired, with their names."""
    layers: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reason:
            layers.setdefault(row.reason, []).append(row.module)
    return [(reason, ", ".join(names)) for reason, names in layers.items()]


PRECISION_HEADER = ("precision", "file", "largest error", "accuracy on val", "latency, fp32 = 1", "in float", "remark")


def precision_rows(choice: PrecisionChoice) -> list[tuple[str, ...]]:
    """One row for each precision of the target: size, error against fp32, accuracy on val and latency."""
    rows: list[tuple[str, ...]] = []
    for row in choice.rows:
        made, ratio = row.conversion, row.latency_ratio
        accuracy = made.accuracy if made else next((c.accuracy_fp32 for r in choice.rows if (c := r.conversion)), None)
        remark = f"ships: {choice.reason}" if row.precision == choice.chosen else row.reason
        approved = int8_approval(made) if made and row.file else ""
        rows.append(
            (
                row.precision,
                mebibytes(row.file.size_bytes) if row.file else "-",
                f"{made.file.max_abs_error:.2g}" if made else "-",
                f"{accuracy:.2%}" if accuracy is not None else "-",
                interval_text(ratio.value, ratio, "x") if ratio else "not timed",
                f"{len(made.kept_float)} of {made.num_layers}" if made else "-",
                "; ".join(filter(None, (remark, approved, *(made.notes if made else ())))),
            )
        )
    return rows


def int8_approval(made: Converted) -> str:
    """Name the processors that an int8 file is approved for; "" for other precisions."""
    approvals = {
        "exact": "approved for kernels that add 8-bit products in 32 bits: x86 with VNNI, ARM, GPUs",
        "any": "approved for all processors: its weights have 7 bits, so that 16-bit sums do not saturate",
    }
    return approvals.get(made.int8_arithmetic, "")


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {value % 60:.0f} s"


def _budget_row(budget: BudgetRow, report: BenchmarkReport) -> Row:
    before, after = budget.value(report.dense), budget.value(report.compressed)
    if budget.ratio:
        ratio = budget.ratio(report)
        change = interval_text(ratio.value, ratio, "x") if ratio else ""
    else:
        change = amount(after / before, "x") if before and after is not None else ""
    return Row(
        name=budget.label,
        dense=_figure_text(budget, report.dense),
        compressed=_figure_text(budget, report.compressed),
        change=change,
    )


def _figure_text(budget: BudgetRow, measurement: Measurement) -> str:
    figure, value = budget.of_measurement(measurement), budget.value(measurement)
    if value is None:
        return NOT_MEASURED
    return interval_text(value, figure if isinstance(figure, Interval) else None, budget.unit)


def _accuracy(measurement: Measurement) -> str:
    accuracy = measurement.accuracy
    if accuracy is None:
        return NOT_MEASURED
    return _percent(accuracy, len(measurement.per_sample_metric))


def _percent(accuracy: Interval, num_samples: int) -> str:
    return f"{amount(100 * accuracy.value, '%')} (n = {num_samples:,})"


def _change_in_pp(drop: Interval) -> str:
    """A drop as a change: a loss is below zero."""
    return bounded(-drop.value, -drop.high, -drop.low, "pp", signed=True)


def interval_text(value: float, interval: Interval | None, unit: str) -> str:
    return bounded(value, interval.low, interval.high, unit) if interval else amount(value, unit)
