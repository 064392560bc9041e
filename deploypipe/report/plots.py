"""The plots of a run, apart from those of its search, as HTML fragments that share one copy of plotly.js."""

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
from deploypipe.report.plot_style import COMPRESSED, DENSE, LIMIT, MUTED, as_html
from deploypipe.report.run_tables import NOT_MEASURED, interval_text, seconds
from deploypipe.text.amounts import amount

_SHOWN_UP_TO = 3  # times the median latency
_LISTED = 5  # names in a summary


def kept_information(summary: ScoreSummary) -> str:
    """Draw the share of its information that each group keeps, by the share of its units that stay."""
    figure = go.Figure()
    last = max(1, len(summary.groups) - 1)
    for number, group in enumerate(summary.groups):
        figure.add_scatter(
            x=[100 * width / group.num_units for width in range(group.num_units + 1)],
            y=[100 * share for share in group.kept_information],
            mode="lines",
            name=group.name,
            line={"width": 1.5, "color": f"hsl({220 - 220 * number / last:.0f}, 75%, 50%)"},  # blue: near the input
            hovertemplate=f"%{{fullData.name}}<br>%{{x:.0f}} % of {group.num_units} units<br>%{{y:.1f}} %"
            "<extra></extra>",
        )
    figure.update_layout(xaxis_title="units kept, %", yaxis_title="information kept, %", showlegend=last < 12)
    shares = ", ".join(f"{sum(g.redundant[i] for g in summary.groups):,} at {100 * s:g} %" for i, s in _shares(summary))
    total = sum(group.num_units for group in summary.groups)
    return as_html(
        figure,
        f"Information kept by units kept, one curve for each of {len(summary.groups)} groups. Of {total:,} units "
        f"so many could be removed while that share of the information stays: {shares}.",
    )


def _shares(summary: ScoreSummary) -> list[tuple[int, float]]:
    return list(enumerate(summary.shares))


def block_similarity(summary: ScoreSummary) -> str:
    """Draw CKA between block outputs, with a frame around each cluster."""
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
    clusters = "; ".join(", ".join(cluster) for cluster in summary.clusters if len(cluster) > 1)
    return as_html(
        figure,
        f"CKA of {len(names)} blocks, pair by pair. Clusters of similar blocks: {clusters or 'none'}.",
        height=max(380, 160 + 16 * len(names)),
    )


def latencies(report: BenchmarkReport) -> str:
    """Draw a histogram of the timed runs of both files, which were run in turns in one process."""
    figure = go.Figure()
    for measurement, label, colour in ((report.dense, "dense", DENSE), (report.compressed, "compressed", COMPRESSED)):
        if measurement.latency is not None:
            most = _SHOWN_UP_TO * measurement.latency.p50_ms.value  # what was interrupted would squeeze the rest
            shown = [sample for sample in measurement.latency.samples_ms if sample <= most]
            figure.add_histogram(x=shown, name=label, marker_color=colour, opacity=0.75, nbinsx=60)
            _mark_median(figure, measurement.latency.p50_ms, colour)
    figure.update_layout(barmode="overlay", xaxis_title="latency, ms", yaxis_title="runs")
    medians = [
        f"{label} {interval_text(m.latency.p50_ms.value, m.latency.p50_ms, 'ms') if m.latency else NOT_MEASURED}"
        for label, m in (("dense", report.dense), ("compressed", report.compressed))
    ]
    return as_html(figure, f"Histogram of single runs. Median latency: {', '.join(medians)}.")


def slices(report: BenchmarkReport, metric: str, most: int) -> str:
    """Draw the mean metric of each slice (class), dense and compressed: the `most` slices with the largest loss."""
    values = [np.array(measured.per_sample_metric) for measured in (report.dense, report.compressed)]
    means = {name: [float(samples[list(at)].mean()) for samples in values] for name, at in report.slices.items() if at}
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
    figure.update_layout(xaxis_title=f"{metric}, %", yaxis={"autorange": "reversed", "type": "category"})
    changes = [amount(100 * (means[name][1] - means[name][0]), "pp", signed=True) for name in names]
    listed = ", ".join(f"{name} {change}" for name, change in list(zip(names, changes, strict=True))[:_LISTED])
    return as_html(figure, f"Change of {metric}, largest loss first: {listed}.", height=140 + 28 * len(names))


def _mark_median(figure: Any, p50: Interval, colour: str) -> None:
    figure.add_vline(x=p50.value, line_color=colour, line_width=2, annotation_text=f"p50 {amount(p50.value, 'ms')}")


def finetune(log: TrainLog, metric: str) -> str:
    """Draw the accuracy on val after each epoch. Epoch 0 is the repaired network before training."""
    figure = go.Figure()
    epochs = [e.epoch for e in log.epochs]
    figure.add_scatter(
        x=epochs,
        y=[100 * e.val_accuracy for e in log.epochs],
        mode="lines+markers",
        name=f"{metric} on val",
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
    figure.update_layout(xaxis={"title": "epoch", "dtick": 1}, yaxis_title=f"{metric} on val, %")
    first, best = (amount(100 * e.val_accuracy, "%") for e in (log.epochs[0], *(chosen or log.epochs[-1:])))
    return as_html(
        figure,
        f"{metric} on val by epoch: {first} at epoch {epochs[0]}, {best} at epoch {log.chosen_epoch}.",
    )


def repair_errors(report: RepairReport) -> str:
    """Draw the relative squared error of each repaired layer's output, before and after repair."""
    rows = [row for row in report.rows if not row.reason]
    names = [row.module for row in rows]
    figure = go.Figure()
    figure.add_bar(x=names, y=[row.error_before for row in rows], name="cut", marker_color=MUTED)
    figure.add_bar(x=names, y=[row.error_after for row in rows], name="repaired", marker_color=COMPRESSED)
    figure.update_layout(yaxis_title="relative squared error", xaxis={"tickangle": -60, "type": "category"})
    pairs = [(r.error_before, r.error_after) for r in rows if r.error_before is not None and r.error_after is not None]
    before, after = (sum(errors) / len(errors) for errors in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return as_html(
        figure, f"Mean relative squared error of {len(pairs)} layers: {before:.3g} after the cut, {after:.3g} repaired."
    )


def stage_times(stages: tuple[StageTime, ...]) -> str:
    """Draw the seconds of each stage. A stage that ran for several networks is numbered; cached stages are pale."""
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
        textposition="outside",
        cliponaxis=False,
    )
    room = 1.25 * max((stage.seconds for stage in stages), default=1.0)  # for the text of the longest bar
    axes = {"xaxis": {"title": "seconds", "range": [0, room]}, "yaxis": {"autorange": "reversed"}}
    figure.update_layout(**axes, showlegend=False)
    longest = sorted(stages, key=lambda stage: -stage.seconds)[:_LISTED]
    listed = ", ".join(f"{title_of(stage.stage)} {seconds(stage.seconds)}" for stage in longest)
    return as_html(figure, f"Time of each stage. The longest: {listed}.", height=120 + 26 * len(stages))
