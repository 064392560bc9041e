"""The figures of a run as text: the same rows for the terminal and for the report."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.records import (
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

NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """One figure of the dense and of the compressed model."""

    name: str
    dense: str
    compressed: str
    change: str


def before_after(result: RunResult) -> tuple[Row, ...]:
    """Dense against compressed, in the order in which one asks."""
    report = result.benchmark
    dense, compressed = report.dense, report.compressed
    drop = report.accuracy_drop_pp
    ratio = report.latency_ratio
    return (
        Row(
            name=result.metric,
            dense=_accuracy(dense),
            compressed=_accuracy(compressed),
            change="" if drop is None else f"{-drop.value:+.2f} pp ({-drop.high:+.2f} to {-drop.low:+.2f})",
        ),
        Row(
            name="latency p50",
            dense=_latency(dense),
            compressed=_latency(compressed),
            change="" if ratio is None else f"{ratio.value:.3f}x ({ratio.low:.3f} to {ratio.high:.3f})",
        ),
        _plain_row("peak memory", dense, compressed, lambda m: m.peak_memory_mib, lambda v: f"{v:.1f} MiB"),
        _plain_row("file size", dense, compressed, lambda m: float(m.file.size_bytes), file_size),
        _plain_row("parameters", dense, compressed, lambda m: float(m.num_params), count),
        _plain_row("MACs", dense, compressed, lambda m: float(m.num_macs), count),
    )


OVERVIEW_HEADER = ("target", "decision", "metric", "latency p50", "peak memory", "file size", "MACs", "why")


def overview_rows(results: Mapping[str, RunResult | str]) -> list[tuple[str, ...]]:
    """One network on several targets: what ships for each, beside the dense model; or the error that ended its run."""
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        if isinstance(result, str):
            rows.append((name, "ERROR", "", "", "", "", "", result))
            continue
        changes = {row.name: row.change for row in before_after(result)}
        shown = (changes[key] for key in (result.metric, *OVERVIEW_HEADER[3:7]))
        rows.append((name, result.decision.verdict.value, *shown, result.decision.reason))
    return rows


COMPARISON_HEADER = ("", "first", "second", "second / first")


def comparison_rows(first: RunResult, second: RunResult) -> list[tuple[str, ...]]:
    """What two runs ship, figure by figure. Accuracies pair where both were tested on the same samples; latencies were
    timed apart, so their quotient is only shown for one device, and says less than an interleaved one."""
    before, after = first.benchmark, second.benchmark
    rows = {row.name: row.compressed for row in before_after(first)}
    others = {row.name: row.compressed for row in before_after(second)}
    same_device = before.environment.device_fingerprint == after.environment.device_fingerprint
    quotients = {
        name: _quotient(*(side.compressed.figures[figure] for side in (before, after)))
        + (", timed apart" if name in _TIMED else "")
        for name, figure in _FIGURES.items()
        if same_device or name not in (*_TIMED, "peak memory")
    }
    metrics = (before.compressed.per_sample_metric, after.compressed.per_sample_metric)
    if before.test_data and before.test_data == after.test_data and first.metric == second.metric and all(metrics):
        drop = interval_of_drop_pp(*metrics)
        quotients[first.metric] = f"{-drop.value:+.2f} pp ({-drop.high:+.2f} to {-drop.low:+.2f})"
    return [
        ("decision", first.decision.verdict.value, second.decision.verdict.value, ""),
        *((name, rows.get(name, ""), others.get(name, ""), quotients.get(name, "")) for name in {**rows, **others}),
    ]


_TIMED = ("latency p50",)
_FIGURES = {  # a row's name -> that of the figure
    "latency p50": "latency_p50",
    "peak memory": "peak_memory",
    "file size": "file_size",
    "parameters": "params",
    "MACs": "macs",
}


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
        "" if check.limit is None else figure(check.limit, check.unit),
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
    """What a reader of the scores should be warned of."""
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
    """What each precision of the target costs and gives; the accuracy is on val, the errors are against fp32."""
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
        return figure(value, unit)
    return f"{figure(value, unit)} ({number(interval.low)} to {number(interval.high)})"


def figure(value: float, unit: str) -> str:
    """A number with its unit; large counts get a k, M or G."""
    return f"{number(value)} {unit}".strip()


def number(value: float) -> str:
    """Four significant digits; thousands, millions and thousand millions shortened."""
    if abs(value) >= 1e4:
        return count(value)
    return f"{value:.4g}"


def count(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {suffix}"
    return f"{value:.4g}"


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


def _plain_row(
    name: str,
    dense: Measurement,
    compressed: Measurement,
    read: Callable[[Measurement], float | None],
    show: Callable[[float], str],
) -> Row:
    before, after = read(dense), read(compressed)
    return Row(
        name=name,
        dense=NOT_MEASURED if before is None else show(before),
        compressed=NOT_MEASURED if after is None else show(after),
        change=f"{after / before:.3f}x" if before and after is not None else "",
    )


def _accuracy(measurement: Measurement) -> str:
    accuracy = measurement.accuracy
    if accuracy is None:
        return NOT_MEASURED
    return f"{100 * accuracy.value:.2f} % (n = {len(measurement.per_sample_metric):,})"


def _latency(measurement: Measurement) -> str:
    if measurement.latency is None:
        return NOT_MEASURED
    p50 = measurement.latency.p50_ms
    return f"{p50.value:.4g} ms ({p50.low:.4g} to {p50.high:.4g})"


def file_size(value: float) -> str:
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"
