"""The figures of a run as text: the same rows for the terminal and for the report."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from deploypipe.budgets import BUDGETS, BudgetRow
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.records import (
    BenchmarkReport,
    Check,
    Conditions,
    Converted,
    Edit,
    GroupCut,
    Interval,
    Measurement,
    PrecisionChoice,
    PruningPlan,
    RepairReport,
    ScoreSummary,
    Waiver,
)
from deploypipe.runs.result import RunResult
from deploypipe.text.amounts import amount, file_size, number

NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """One figure of the dense and of the compressed model."""

    name: str
    dense: str
    compressed: str
    change: str


def before_after(result: RunResult) -> tuple[Row, ...]:
    """Dense against compressed: the accuracy, then every budget's figure."""
    report = result.benchmark
    dense, compressed = report.dense, report.compressed
    drop = report.accuracy_drop_pp
    return (
        Row(
            name=result.metric,
            dense=_accuracy(dense),
            compressed=_accuracy(compressed),
            change="" if drop is None else f"{-drop.value:+.2f} pp ({-drop.high:+.2f} to {-drop.low:+.2f})",
        ),
        *(_budget_row(budget, report) for budget in BUDGETS.values()),
    )


def overview_header() -> tuple[str, ...]:
    return ("target", "decision", "metric", *_overview_labels(), "why")


def overview_rows(results: Mapping[str, RunResult | str]) -> list[tuple[str, ...]]:
    """One row a target: how the model that ships differs from the dense one, or the error that ended the run."""
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
        quotients[first.metric] = f"{-drop.value:+.2f} pp ({-drop.high:+.2f} to {-drop.low:+.2f})"
    return [
        ("decision", first.decision.verdict.value, second.decision.verdict.value, ""),
        *((name, rows.get(name, ""), others.get(name, ""), quotients.get(name, "")) for name in {**rows, **others}),
    ]


def _overview_labels() -> list[str]:
    return [budget.label for budget in BUDGETS.values() if budget.is_in_overview]


def _quotient(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NOT_MEASURED
    return f"{after / before:.3f}x" if before else ""


def check_cells(check: Check) -> tuple[str, str, str, str, str]:
    """Name, status, measured, limit and reason of one gate check."""
    return (
        check.name.replace("_", " "),
        str(check.status.value),
        NOT_MEASURED if check.measured is None else with_interval(check.measured, check.interval, check.unit),
        "" if check.limit is None else amount(check.limit, check.unit),
        check.reason if check.waiver is None else f"{check.reason}; {_waived(check.waiver)}",
    )


def what_is_covered(conditions: Conditions | None) -> str:
    """What the interval of an absolute latency is about, in words."""
    lasted = f", {conditions.after.at_s - conditions.before.at_s:.0f} s" if conditions else ""
    return (
        f"the interval covers this machine's median under drifts as slow as the measurement{lasted}, "
        "not those from day to day"
    )


def _waived(waiver: Waiver) -> str:
    return f"WAIVED by {waiver.by} from {waiver.granted} to {waiver.expires}: {waiver.reason}"


def score_table(summary: ScoreSummary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows, by group: how many units could go at each share of kept information, and how sure that is.

    Columns that would be empty are left out.
    """
    heads = (
        "group",
        "units",
        *(f"at {100 * s:g} %" for s in summary.shares),
        "suggested",
        "stability",
        "by chance",
        "remark",
    )
    rows = [
        (
            group.name,
            str(group.num_units),
            *map(str, group.redundant),
            "" if group.suggested is None else str(group.suggested),
            "" if group.stability is None else f"{group.stability:.2f}",
            "" if group.null is None else f"{100 * group.null:.0f} %",
            group.reason,
        )
        for group in summary.groups
    ]
    shown = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    return tuple(heads[c] for c in shown), [tuple(row[c] for c in shown) for row in rows]


def score_notes(summary: ScoreSummary) -> list[str]:
    """Warnings for readers of the scores."""
    if not summary.shaky:
        return []
    lowest = min(group.stability for group in summary.groups if group.stability is not None)
    wanted = summary.samples_wanted
    remedy = f"about {wanted} samples would settle them" if wanted else "far more samples, or another scorer, may help"
    return [
        f"{len(summary.shaky)} of {len(summary.groups)} rankings change between halves of the samples (lowest rank "
        f"correlation {lowest:.2f}); {remedy} (observe.num_samples)."
    ]


def plan_rows(plan: PruningPlan) -> list[tuple[str, ...]]:
    """Group, width before and after, width asked for, and the reason where it got another."""
    return [(c.group, f"{c.num_units} -> {_width(c)}", str(c.asked), c.reason) for c in plan.cuts]


def repair_remarks(report: RepairReport) -> list[tuple[str, str]]:
    """Why layers were left as they were, and which: a row for each reason."""
    layers: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reason:
            layers.setdefault(row.reason, []).append(row.module)
    return [(reason, ", ".join(names)) for reason, names in layers.items()]


PRECISION_HEADER = ("precision", "file", "largest error", "accuracy on val", "latency, fp32 = 1", "in float", "remark")


def precision_rows(choice: PrecisionChoice) -> list[tuple[str, ...]]:
    """Latency, size, accuracy (on val) and error (against fp32) of each precision of the target."""
    rows: list[tuple[str, ...]] = []
    for row in choice.rows:
        made, ratio = row.conversion, row.latency_ratio
        accuracy = made.accuracy if made else next((c.accuracy_fp32 for r in choice.rows if (c := r.conversion)), None)
        remark = f"ships: {choice.reason}" if row.precision == choice.chosen else row.reason
        approved = int8_approval(made) if made and row.file else ""
        rows.append(
            (
                row.precision,
                file_size(row.file.size_bytes) if row.file else "-",
                f"{made.file.max_abs_error:.2g}" if made else "-",
                f"{accuracy:.2%}" if accuracy is not None else "-",
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else "not timed",
                f"{len(made.kept_float)} of {made.num_layers}" if made else "-",
                "; ".join(filter(None, (remark, approved, *(made.notes if made else ())))),
            )
        )
    return rows


def int8_approval(made: Converted) -> str:
    """The processors that an int8 file was judged for; empty for other precisions."""
    approvals = {
        "exact": "approved for kernels that add 8-bit products in 32 bits: x86 with VNNI, ARM, GPUs",
        "any": "approved for all processors: its weights have 7 bits, so that 16-bit sums do not saturate",
    }
    return approvals.get(made.int8_arithmetic, "")


def plan_differences(first: PruningPlan, second: PruningPlan) -> list[tuple[str, ...]]:
    """What, in the first plan, in the second, and what the second removes more or less: empty for equal plans.

    Plans are equal where they remove the same from the same model, whatever was asked for. Edits of single modules
    show only where groups and blocks agree: elsewhere they follow from those.
    """
    hashes = zip(*(plan.model_fingerprint.partition("-")[::2] for plan in (first, second)), strict=True)
    parts = zip(("structure", "weights"), hashes, strict=True)
    rows: list[tuple[str, ...]] = [(f"model {part}", a[:12], b[:12], "") for part, (a, b) in parts if a != b]
    cuts, others = ({cut.group: cut for cut in plan.cuts} for plan in (first, second))
    removals = [(name, cuts.get(name), others.get(name)) for name in dict.fromkeys((*cuts, *others))]
    found: list[tuple[str, ...]] = [
        (name, _cut(a), _cut(b), _change(_removed(a), _removed(b))) for name, a, b in removals
    ]
    found = [row for row in found if row[1] != row[2] or row[3]]
    for name in dict.fromkeys((*first.blocks, *second.blocks)):
        states = ["removed" if name in plan.blocks else "stays" for plan in (first, second)]
        found += [(f"block {name}", *states, "")] if states[0] != states[1] else []
    return rows + (found or _edit_differences(first.edits, second.edits))


def ranges(indices: Iterable[int], most: int = 6) -> str:
    """Indices as "0-3, 7, 9"; of more than `most` ranges the first ones, and the number of the other indices."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]]
    rest = sum(map(len, runs[most:]))
    return ", ".join([*texts, f"{rest} more"] if rest else texts)


def with_interval(value: float, interval: Interval | None, unit: str) -> str:
    if interval is None:
        return amount(value, unit)
    return f"{amount(value, unit)} ({number(interval.low)} to {number(interval.high)})"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value // 60)} min {value % 60:.0f} s"


def _edit_differences(first: Iterable[Edit], second: Iterable[Edit]) -> list[tuple[str, ...]]:
    gone, others = ({(e.module, e.side): e.removed for e in edits} for edits in (first, second))
    pairs = [(key, gone.get(key, ()), others.get(key, ())) for key in dict.fromkeys((*gone, *others))]
    return [
        (f"{module} {side}", f"{len(a)} removed", f"{len(b)} removed", _change(a, b))
        for (module, side), a, b in pairs
        if a != b
    ]


def _width(cut: GroupCut) -> int:
    return cut.num_units - len(cut.removed)


def _cut(cut: GroupCut | None) -> str:
    return "whole" if cut is None or not cut.removed else f"{_width(cut)} of {cut.num_units}"


def _removed(cut: GroupCut | None) -> tuple[int, ...]:
    return cut.removed if cut else ()


def _change(first: Iterable[int], second: Iterable[int]) -> str:
    more, less = ranges(set(second) - set(first)), ranges(set(first) - set(second))
    return "; ".join([f"removes {more}"] * bool(more) + [f"keeps {less}"] * bool(less))


def _budget_row(budget: BudgetRow, report: BenchmarkReport) -> Row:
    before, after = budget.value(report.dense), budget.value(report.compressed)
    if budget.ratio:
        ratio = budget.ratio(report)
        change = f"{ratio.value:.3f}x ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else ""
    else:
        change = f"{after / before:.3f}x" if before and after is not None else ""
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
    interval = f" ({figure.low:.4g} to {figure.high:.4g})" if isinstance(figure, Interval) else ""
    return f"{budget.text(value)}{interval}"


def _accuracy(measurement: Measurement) -> str:
    accuracy = measurement.accuracy
    if accuracy is None:
        return NOT_MEASURED
    return f"{100 * accuracy.value:.2f} % (n = {len(measurement.per_sample_metric):,})"
