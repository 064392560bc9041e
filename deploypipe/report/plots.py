"""The report's figures, as HTML fragments that share one copy of plotly.js."""

import hashlib
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from deploypipe.records import (
    BenchmarkReport,
    Interval,
    RepairReport,
    ScoreSummary,
    StageTime,
    TrainLog,
)
from deploypipe.records.stages import title_of
from deploypipe.text.printable_text import printable

DENSE, COMPRESSED, MUTED, LIMIT = "#8a94a6", "#2563eb", "#cbd2dc", "#dc2626"
CONFIG = {"displayModeBar": False, "responsive": True}  # its buttons would lie over the legend
_SHOWN_UP_TO = 3  # times the median latency


def kept_information(summary: ScoreSummary) -> str:
    """The share of its information that each group keeps, by the share of its units that stay."""
    figure = go.Figure()
    last = max(1, len(summary.groups) - 1)
    for number, group in enumerate(summary.groups):
        figure.add_scatter(
            x=[100 * width / group.num_units for width in range(group.num_units + 1)],
            y=[100 * share for share in group.kept_information],
            mode="lines",
            name=group.name,
            line={"width": 1.5, "color": f"hsl({220 - 220 * number / last:.0f}, 75%, 45%)"},  # blue: near the input
            hovertemplate=f"%{{fullData.name}}<br>%{{x:.0f}} % of {group.num_units} units<br>%{{y:.1f}} %"
            "<extra></extra>",
        )
    figure.update_layout(xaxis_title="units kept, %", yaxis_title="information kept, %", showlegend=last < 12)
    return as_html(figure)


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
    return as_html(figure, height=max(380, 160 + 16 * len(names)))


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
    return as_html(figure)


def slices(report: BenchmarkReport, most: int) -> str:
    """The mean metric of each class, or of what else the task names, dense and compressed; the `most` that lost most,
    in that order."""
    metrics = [np.array(measured.per_sample_metric) for measured in (report.dense, report.compressed)]
    means = {name: [float(metric[list(at)].mean()) for metric in metrics] for name, at in report.slices.items() if at}
    names = sorted(means, key=lambda name: means[name][1] - means[name][0])[:most]
    figure = go.Figure()
    for name in names:
        figure.add_shape(
            type="line",
            y0=name,
            y1=name,
            x0=100 * means[name][0],
            x1=100 * means[name][1],
            line_color=MUTED,
            layer="below",
        )
    for i, (label, colour) in enumerate((("dense", DENSE), ("compressed", COMPRESSED))):
        figure.add_scatter(
            y=names,
            x=[100 * means[name][i] for name in names],
            name=label,
            mode="markers",
            marker={"color": colour, "size": 14 - 4 * i},
            customdata=[len(report.slices[name]) for name in names],
            hovertemplate="%{y}: %{x:.2f} %, %{customdata:,} samples",
        )
    figure.update_layout(xaxis_title="metric, %", yaxis={"autorange": "reversed", "type": "category"})
    return as_html(figure, height=140 + 28 * len(names))


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
    return as_html(figure)


def repair_errors(report: RepairReport) -> str:
    """Relative squared error of each consumer's output, before and after its weights were solved."""
    rows = [row for row in report.rows if not row.reason]
    names = [row.module for row in rows]
    figure = go.Figure()
    figure.add_bar(x=names, y=[row.error_before for row in rows], name="cut", marker_color=MUTED)
    figure.add_bar(x=names, y=[row.error_after for row in rows], name="repaired", marker_color=COMPRESSED)
    figure.update_layout(yaxis_title="relative squared error", xaxis={"tickangle": -60, "type": "category"})
    return as_html(figure)


def stage_times(stages: tuple[StageTime, ...]) -> str:
    """Seconds of each stage, numbered where it was done for several networks; those of an earlier run are pale."""
    names = [title_of(stage.stage) for stage in stages]
    turns = [names[: number + 1].count(name) for number, name in enumerate(names)]
    colours = [MUTED if stage.was_cached else COMPRESSED for stage in stages]
    figure = go.Figure()
    figure.add_bar(
        y=[name if turn == 1 else f"{name} ({turn})" for name, turn in zip(names, turns, strict=True)],
        x=[stage.seconds for stage in stages],
        orientation="h",
        marker_color=colours,
        text=[f"{stage.seconds:.1f} s" + (" (cached)" if stage.was_cached else "") for stage in stages],
        textposition="auto",
    )
    figure.update_layout(xaxis_title="seconds", yaxis={"autorange": "reversed"}, showlegend=False)
    return as_html(figure, height=120 + 26 * len(stages))


def as_html(figure: Any, height: int = 380, top: int = 30) -> str:
    """The figure as a fragment, in the look they share."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 10, "r": 10, "t": top, "b": 10},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(automargin=True)
    name = hashlib.sha256(figure.to_json().encode()).hexdigest()[:16]  # the same figure, the same bytes
    _show_names_as_text(figure)
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG, div_id=f"figure-{name}")
    return text


def _show_names_as_text(figure: Any) -> None:
    """plotly reads HTML in names and labels: of it only our own line breaks stay."""
    for trace in figure.data:
        for field in ("name", "text", "x", "y", "customdata"):
            value = getattr(trace, field, None)
            if isinstance(value, str):
                trace[field] = _as_text(value)
            elif value is not None and any(isinstance(item, str) for item in value):
                trace[field] = [_as_text(item) if isinstance(item, str) else item for item in value]
    for shape in figure.layout.shapes:  # at a label's place
        for field in ("x0", "x1", "y0", "y1"):
            if isinstance(shape[field], str):
                shape[field] = _as_text(shape[field])
    for axis in figure.select_yaxes():
        if axis.ticktext is not None:
            axis.ticktext = [_as_text(str(item)) for item in axis.ticktext]


def _as_text(label: str) -> str:
    return "<br>".join(escape(printable(part), quote=False) for part in label.split("<br>"))
