"""The plots of a search apart from its trade-off, as HTML fragments."""

from collections.abc import Sequence

import plotly.graph_objects as go

from deploypipe.records import Candidate, LatencyFit
from deploypipe.report.joint_pareto import EvaluatedNetwork, front_sentence, joint_front
from deploypipe.report.plot_style import COMPRESSED, DENSE, MUTED, PALE, as_html
from deploypipe.report.search_text import fit_sentence
from deploypipe.report.width_tables import Stage

_APART = {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0, 0, 0, 0)"}  # names from their bars


def all_targets(networks: Sequence[EvaluatedNetwork], dense: Candidate, metric: str) -> str:
    """Draw accuracy against MACs of the evaluated networks of all targets, with their common frontier."""

    def places(some: Sequence[EvaluatedNetwork]) -> dict[str, list[float]]:
        shares = [n.candidate.num_macs / dense.num_macs for n in some]
        return {"x": shares, "y": [100 * n.candidate.accuracy for n in some]}

    figure = go.Figure()
    line = {"shape": "hv", "color": DENSE, "width": 1, "dash": "dot"}
    figure.add_scatter(**places(joint_front(networks)), mode="lines", line=line, name="frontier", hoverinfo="skip")
    for target in dict.fromkeys(n.target for n in networks):
        own = [n for n in networks if n.target == target]
        figure.add_scatter(
            **places(own),
            mode="markers",
            marker={
                "size": [16 if n.is_winner else 9 for n in own],
                "symbol": ["star" if n.is_winner else "circle" for n in own],
            },
            name=target,
            text=[f"{target}, trial {n.trial}{', chosen' if n.is_winner else ''}" for n in own],
            hovertemplate="%{text}<br>%{y:.2f} %, %{x:.3f}x the MACs<extra></extra>",
        )
    marker = {"color": DENSE, "symbol": "diamond", "size": 11}
    figure.add_scatter(x=[1.0], y=[100 * dense.accuracy], mode="markers", name="dense", marker=marker)
    figure.update_layout(xaxis_title="MACs, as a share of the dense network's", yaxis_title=f"{metric} on val, %")
    return as_html(figure, f"{metric} on val against MACs. {front_sentence(networks)}", height=440)


def importances(shares: dict[str, float]) -> str:
    """Draw the importance of each knob, the largest on top."""
    ranked = sorted(shares.items(), key=lambda item: item[1])
    percent = [100 * share for _, share in ranked]
    figure = go.Figure()
    figure.add_bar(
        y=[name for name, _ in ranked],
        x=percent,
        orientation="h",
        marker_color=COMPRESSED,
        text=[f"{value:.0f} %" for value in percent],
        textposition="outside",
        cliponaxis=False,
    )
    room = 1.2 * max(percent, default=100.0)  # for the text of the longest bar
    axes = {"xaxis": {"title": "importance, %", "range": [0, room]}, "yaxis": {"type": "category"}}
    figure.update_layout(**axes, showlegend=False)
    figure.update_yaxes(**_APART)
    listed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in reversed(ranked))
    return as_html(figure, f"Importance of each knob: {listed}.", height=120 + 30 * len(ranked))


def latency_fit(fit: LatencyFit) -> str:
    """Draw predicted against measured latency, both as shares of the dense network's."""
    measured, predicted = ([100 * share for share in shares] for shares in (fit.measured, fit.predicted))
    ends = [min(*measured, *predicted), max(*measured, *predicted)]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="predicted = measured", line={"color": DENSE, "dash": "dash", "width": 1}
    )
    figure.add_scatter(
        x=measured,
        y=predicted,
        mode="markers",
        name="networks",
        marker={"color": COMPRESSED, "size": 7, "opacity": 0.75},
        hovertemplate="measured %{x:.1f} %<br>predicted %{y:.1f} %<extra></extra>",
    )
    figure.update_layout(xaxis_title="measured, % of dense", yaxis_title="predicted, % of dense")
    return as_html(figure, f"Predicted against measured latency. {fit_sentence(fit)}")


def widths(stage: Stage) -> str:
    """Draw the width of each layer of one stage, from top to bottom: kept, in front of what it had."""
    layers = stage.layers
    at = list(range(len(layers)))
    figure = go.Figure()
    figure.add_bar(
        y=at,
        x=[100] * len(layers),
        orientation="h",
        name="dense",
        marker={"color": PALE, "pattern": {"shape": ["/" if x.is_gone else "" for x in layers], "fgcolor": MUTED}},
        hoverinfo="skip",
    )
    figure.add_bar(
        y=at,
        x=[100 * layer.kept / layer.num_units if layer.num_units else 0 for layer in layers],
        orientation="h",
        name="kept",
        marker_color=COMPRESSED,
        text=[layer.name for layer in layers],
        textposition="none",
        hovertemplate="%{text}<br>%{x:.0f} % kept<extra></extra>",
    )
    labels = [f"{stage.short(x)}  {'gone' if x.is_gone else f'{x.kept} of {x.num_units}'}" for x in layers]
    figure.update_layout(barmode="overlay", bargap=0.25, showlegend=False)
    figure.update_xaxes(range=[0, 108], tickvals=[0, 50, 100], ticktext=["0", "50", "100 %"])
    figure.update_yaxes(tickvals=at, ticktext=labels, range=[len(layers) - 0.5, -0.5], tickfont={"size": 12})
    figure.update_yaxes(**_APART, showgrid=False)
    return as_html(figure, _widths_summary(stage), height=50 + 20 * len(layers), top=6)


def _widths_summary(stage: Stage) -> str:
    gone = sum(layer.is_gone for layer in stage.layers)
    left = "" if stage.share_left is None else f", {100 * stage.share_left:.0f} % of their units kept"
    num = len(stage.layers)
    return f"{num} {'layer' if num == 1 else 'layers'}{left}{f', {gone} gone with a block' if gone else ''}."
