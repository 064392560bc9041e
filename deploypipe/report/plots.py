"""The report's figures, as HTML fragments that share one copy of plotly.js."""

from typing import Any

import plotly.graph_objects as go

from deploypipe.records import (
    BenchmarkReport,
    Candidate,
    Interval,
    PruneReport,
    RepairReport,
    ScoreSummary,
    SearchResult,
    StageTime,
    TrainLog,
)
from deploypipe.target import Target

DENSE, COMPRESSED, MUTED, LIMIT = "#8a94a6", "#2563eb", "#cbd2dc", "#dc2626"
CONFIG = {"displayModeBar": False, "responsive": True}  # its buttons would lie over the legend
_SHOWN_UP_TO = 3  # times the median latency


def widths(report: PruneReport) -> str:
    """Width of each structure before and after."""
    rows = [row for row in report.rows if row.kind == "channels"]
    names = [row.name for row in rows]
    figure = go.Figure()
    figure.add_bar(y=names, x=[r.width_before for r in rows], name="dense", marker_color=MUTED, orientation="h")
    figure.add_bar(y=names, x=[r.realised for r in rows], name="compressed", marker_color=COMPRESSED, orientation="h")
    figure.update_layout(barmode="overlay", xaxis_title="channels", yaxis={"autorange": "reversed", "type": "category"})
    return _html(figure, height=140 + 20 * len(names))


def kept_information(summary: ScoreSummary) -> str:
    """What share of its information each group keeps, by the share of its units that stay."""
    figure = go.Figure()
    last = max(1, len(summary.groups) - 1)
    for number, group in enumerate(summary.groups):
        figure.add_scatter(
            x=[100 * width / group.num_units for width in range(group.num_units + 1)],
            y=[100 * share for share in group.kept_information],
            mode="lines",
            name=group.name,
            line={"width": 1.5, "color": f"hsl({220 - 220 * number / last:.0f}, 75%, 45%)"},  # blue: near the input
            hovertemplate=f"{group.name}<br>%{{x:.0f}} % of {group.num_units} units<br>%{{y:.1f}} %<extra></extra>",
        )
    figure.update_layout(xaxis_title="units kept, %", yaxis_title="information kept, %", showlegend=last < 12)
    return _html(figure)


def block_similarity(summary: ScoreSummary) -> str:
    """CKA between block outputs, the clusters drawn on it."""
    names = list(summary.block_names)
    figure = go.Figure()
    figure.add_heatmap(
        z=summary.block_cka,
        x=names,
        y=names,
        zmin=0,
        zmax=1,
        colorscale="Blues",
        colorbar={"title": "CKA"},
        hovertemplate="%{x}<br>%{y}<br>CKA %{z:.3f}<extra></extra>",
    )
    for cluster in summary.clusters:
        if len(cluster) > 1:
            low, high = names.index(cluster[0]) - 0.5, names.index(cluster[-1]) + 0.5
            figure.add_shape(type="rect", x0=low, x1=high, y0=low, y1=high, line={"color": LIMIT, "width": 2})
    figure.update_layout(xaxis={"type": "category"}, yaxis={"autorange": "reversed", "type": "category"})
    return _html(figure, height=max(380, 160 + 16 * len(names)))


def trials(search: SearchResult, target: Target) -> str:
    """Accuracy against latency (MACs, where nothing was timed) of every trial: on val, after repair, not fine-tuned."""
    best = search.trials[search.best]
    figure = go.Figure()
    for label, colour, is_feasible in (("over budget", MUTED, False), ("within budget", DENSE, True)):
        shown = [t for t in search.trials if t.feasible is is_feasible and t.number != best.number]
        _add_points(figure, shown, label, {"color": colour, "size": 9})
    star = {"color": COMPRESSED, "size": 16, "symbol": "star"}
    _add_points(figure, [best], "chosen", star)
    dense = search.dense
    unit = _unit(dense)
    figure.add_scatter(
        x=[_cost(dense)],
        y=[100 * dense.accuracy],
        mode="markers",
        name="dense",
        marker={"color": "#111827", "size": 11, "symbol": "diamond"},
        hovertemplate=f"dense<br>%{{x:.4g}} {unit}<br>%{{y:.2f}} %<extra></extra>",
    )
    _add_budget_lines(figure, target, dense.accuracy, dense.latency_p50_ms)
    figure.update_layout(xaxis_title="latency p50, ms" if unit == "ms" else unit, yaxis_title="accuracy on val, %")
    return _html(figure)


def _cost(candidate: Candidate) -> float:
    return candidate.num_macs if candidate.latency_p50_ms is None else candidate.latency_p50_ms


def _unit(candidate: Candidate) -> str:
    return "MACs" if candidate.latency_p50_ms is None else "ms"


def _add_points(figure: Any, shown: list[Any], label: str, marker: dict[str, object]) -> None:
    figure.add_scatter(
        x=[_cost(t.candidate) for t in shown],
        y=[100 * t.candidate.accuracy for t in shown],
        mode="markers",
        name=label,
        marker=marker,
        text=[f"trial {t.number}<br>{t.candidate.num_macs:,} MACs<br>{t.candidate.num_params:,} params" for t in shown],
        hovertemplate="%{text}<br>%{x:.4g}<br>%{y:.2f} %<extra></extra>",
    )


def _add_budget_lines(figure: Any, target: Target, accuracy: float, p50_ms: float | None) -> None:
    line = {"line_color": LIMIT, "line_dash": "dash", "line_width": 1}
    limit = target.budget.limits().get("latency_p50")
    if limit is not None and p50_ms is not None:
        figure.add_vline(x=limit.absolute(p50_ms), annotation_text="latency budget", **line)
    figure.add_hline(y=100 * accuracy - target.budget.accuracy_drop_pp, annotation_text="accuracy budget", **line)


def latencies(report: BenchmarkReport) -> str:
    """All timed runs of both files, taken in turns in one process."""
    figure = go.Figure()
    for measurement, label, colour in ((report.dense, "dense", DENSE), (report.compressed, "compressed", COMPRESSED)):
        if measurement.latency is not None:
            most = _SHOWN_UP_TO * measurement.latency.p50_ms.value  # what was interrupted would squeeze the rest
            shown = [sample for sample in measurement.latency.samples_ms if sample <= most]
            figure.add_histogram(x=shown, name=label, marker_color=colour, opacity=0.75, nbinsx=60)
            _mark_median(figure, measurement.latency.p50_ms, colour)
    figure.update_layout(barmode="overlay", xaxis_title="latency, ms", yaxis_title="runs")
    return _html(figure)


def _mark_median(figure: Any, p50: Interval, colour: str) -> None:
    figure.add_vline(x=p50.value, line_color=colour, line_width=2, annotation_text=f"p50 {p50.value:.4g} ms")


def finetune(log: TrainLog) -> str:
    """Validation accuracy after each epoch; epoch 0 is the repaired network before training."""
    figure = go.Figure()
    epochs = [e.epoch for e in log.epochs]
    figure.add_scatter(
        x=epochs,
        y=[100 * e.val_accuracy for e in log.epochs],
        mode="lines+markers",
        name="validation accuracy",
        line_color=COMPRESSED,
    )
    chosen = [e for e in log.epochs if e.epoch == log.chosen_epoch]
    figure.add_scatter(
        x=[e.epoch for e in chosen],
        y=[100 * e.val_accuracy for e in chosen],
        mode="markers",
        name="chosen",
        marker={"color": COMPRESSED, "size": 16, "symbol": "star"},
    )
    figure.update_layout(xaxis={"title": "epoch", "dtick": 1}, yaxis_title="accuracy on validation, %")
    return _html(figure)


def repair_errors(report: RepairReport) -> str:
    """Relative squared error of each consumer's output, before and after its weights were solved."""
    rows = [row for row in report.rows if not row.reason]
    names = [row.module for row in rows]
    figure = go.Figure()
    figure.add_bar(x=names, y=[row.error_before for row in rows], name="cut", marker_color=MUTED)
    figure.add_bar(x=names, y=[row.error_after for row in rows], name="repaired", marker_color=COMPRESSED)
    figure.update_layout(yaxis_title="relative squared error", xaxis={"tickangle": -60, "type": "category"})
    return _html(figure)


def stage_times(stages: tuple[StageTime, ...]) -> str:
    """Seconds of each stage; those read from an earlier run are pale."""
    colours = [MUTED if stage.was_cached else COMPRESSED for stage in stages]
    figure = go.Figure()
    figure.add_bar(
        y=[stage.stage for stage in stages],
        x=[stage.seconds for stage in stages],
        orientation="h",
        marker_color=colours,
        text=[f"{stage.seconds:.1f} s" + (" (cached)" if stage.was_cached else "") for stage in stages],
        textposition="auto",
    )
    figure.update_layout(xaxis_title="seconds", yaxis={"autorange": "reversed"}, showlegend=False)
    return _html(figure, height=120 + 26 * len(stages))


def _html(figure: Any, height: int = 380) -> str:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(automargin=True)
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
    return text
