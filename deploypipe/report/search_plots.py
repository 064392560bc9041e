"""The figures of a search, as HTML fragments."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from deploypipe.budgets import BUDGETS, LATENCY_P50, MACS, PEAK_MEMORY
from deploypipe.records import Candidate, LatencyFit, SearchResult, Trial
from deploypipe.report.joint_pareto import Judged, joint_front
from deploypipe.report.plots import COMPRESSED, DENSE, LIMIT, MUTED, as_html
from deploypipe.report.search_text import held_budgets
from deploypipe.report.width_tables import Stage
from deploypipe.target import Target

_INK = "#111827"
_APART = {"ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0, 0, 0, 0)"}  # names from their bars
_OVER, _STOPPED = "#b45309", "#5b6474"


def trials(search: SearchResult, target: Target, objectives: Sequence[str]) -> str:
    """Accuracy against latency (MACs, where nothing was timed) of every trial: on val, after repair, not fine-tuned."""
    figure = go.Figure()
    _add_budget_lines(figure, search, target)
    _add_front(figure, search, is_line=PEAK_MEMORY not in objectives)
    others = [trial for trial in search.trials if trial.number != search.trials[search.best].number]
    fitting = [trial for trial in others if trial.feasible]
    markers: list[tuple[str, list[Trial], dict[str, object]]] = [
        ("over budget", [t for t in others if not t.feasible], {"color": _OVER, "symbol": "x-thin-open", "size": 9}),
        (
            "stopped early",
            [t for t in fitting if t.is_stopped],
            {"color": _STOPPED, "symbol": "triangle-down-open", "size": 9},
        ),
        ("within budget", [t for t in fitting if not t.is_stopped], {"color": DENSE, "symbol": "circle", "size": 9}),
        ("chosen", [search.trials[search.best]], {"color": COMPRESSED, "symbol": "star", "size": 15}),
    ]
    for label, shown, marker in markers:
        if shown:
            _add_points(figure, shown, label, marker)
    _add_dense(figure, search.dense)
    is_timed = search.dense.latency_p50_ms is not None
    figure.update_layout(
        xaxis_title="latency p50, ms" if is_timed else "MACs", yaxis_title="accuracy on val, %", hovermode="closest"
    )
    return as_html(figure, height=440)


def all_targets(networks: Sequence[Judged], dense: Candidate) -> str:
    """Accuracy against MACs of every network that was judged for any target, with their common front."""

    def places(some: Sequence[Judged]) -> dict[str, list[float]]:
        shares = [n.candidate.num_macs / dense.num_macs for n in some]
        return {"x": shares, "y": [100 * n.candidate.accuracy for n in some]}

    figure = go.Figure()
    line = {"shape": "hv", "color": DENSE, "width": 1, "dash": "dot"}
    figure.add_scatter(
        **places(joint_front(networks)), mode="lines", line=line, name="beaten by none", hoverinfo="skip"
    )
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
    figure.update_layout(xaxis_title="MACs, as a share of the dense network's", yaxis_title="accuracy on val, %")
    return as_html(figure, height=440)


def importances(shares: dict[str, float]) -> str:
    """The knobs' shares, the largest on top."""
    ranked = sorted(shares.items(), key=lambda item: item[1])
    percent = [100 * share for _, share in ranked]
    figure = go.Figure()
    figure.add_bar(
        y=[name for name, _ in ranked],
        x=percent,
        orientation="h",
        marker_color=COMPRESSED,
        text=[f"{value:.0f} %" for value in percent],
        textposition="auto",
    )
    figure.update_layout(xaxis_title="importance, %", yaxis_type="category", showlegend=False)
    figure.update_yaxes(**_APART)
    return as_html(figure, height=120 + 30 * len(ranked))


def latency_fit(fit: LatencyFit) -> str:
    """Predicted against measured latency, both as shares of the dense network's."""
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
    return as_html(figure)


def widths(stage: Stage) -> str:
    """One stage's layers from top to bottom: what is kept of each, before what it had."""
    layers = stage.layers
    at = list(range(len(layers)))
    figure = go.Figure()
    figure.add_bar(
        y=at,
        x=[100] * len(layers),
        orientation="h",
        name="dense",
        marker={"color": "#e8ebf0", "pattern": {"shape": ["/" if x.is_gone else "" for x in layers], "fgcolor": MUTED}},
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
    return as_html(figure, height=50 + 20 * len(layers), top=6)


def _cost(candidate: Candidate) -> float:
    return candidate.num_macs if candidate.latency_p50_ms is None else candidate.latency_p50_ms


def _add_points(figure: Any, shown: list[Trial], label: str, marker: dict[str, object]) -> None:
    figure.add_scatter(
        x=[_cost(t.candidate) for t in shown],
        y=[100 * t.candidate.accuracy for t in shown],
        mode="markers",
        name=label,
        marker={"line": {"width": 2}, **marker} if "open" in str(marker["symbol"]) else marker,
        text=[_about(t) for t in shown],
        hovertemplate="%{text}<extra>" + label + "</extra>",
    )


def _about(trial: Trial) -> str:
    seen = trial.candidate
    num = f" (n = {trial.num_val_samples:,})" if trial.num_val_samples else ""
    lines = [
        f"trial {trial.number}",
        f"accuracy {100 * seen.accuracy:.2f} %{num}",
        *([] if seen.latency_p50_ms is None else [f"{seen.latency_p50_ms:.4g} ms"]),
        f"blocks removed: {len(trial.plan.blocks)}",
        f"{seen.num_params:,} parameters",
        f"{seen.num_macs:,} MACs",
        *(f"{name} {value:.3g}" for name, value in trial.knobs.items()),
    ]
    return "<br>".join(lines)


def _add_front(figure: Any, search: SearchResult, *, is_line: bool) -> None:
    """A line only where the two axes are what the front weighs."""
    front = sorted((search.trials[number].candidate for number in search.pareto_front), key=_cost)
    if front:
        figure.add_scatter(
            x=[_cost(candidate) for candidate in front],
            y=[100 * candidate.accuracy for candidate in front],
            mode="lines+markers" if is_line else "markers",
            name="Pareto front",
            line={"color": COMPRESSED, "width": 1.5},
            marker={"symbol": "circle-open", "size": 18, "color": COMPRESSED, "line": {"width": 1.5}},
            hoverinfo="skip",
        )


def _add_dense(figure: Any, dense: Candidate) -> None:
    unit = "MACs" if dense.latency_p50_ms is None else "ms"
    figure.add_scatter(
        x=[_cost(dense)],
        y=[100 * dense.accuracy],
        mode="markers",
        name="dense",
        marker={"color": _INK, "size": 11, "symbol": "diamond"},
        hovertemplate=f"dense<br>%{{x:.4g}} {unit}<br>%{{y:.2f}} %<extra></extra>",
    )


def _add_budget_lines(figure: Any, search: SearchResult, target: Target) -> None:
    line = {"line_color": LIMIT, "line_width": 1}
    name = MACS if search.dense.latency_p50_ms is None else LATENCY_P50
    cost = _cost(search.dense)
    asked = target.budget.limits().get(name)
    held = next((budget.limit for budget in held_budgets(search) if budget.name == name), None)
    label = BUDGETS[name].label
    if asked is not None:
        budget = asked.absolute(cost)
        figure.add_vline(x=budget, line_dash="dash", annotation_text=f"{label} budget", **line)
    if held is not None and (asked is None or held * cost < 0.999 * asked.absolute(cost)):
        figure.add_vline(x=held * cost, line_dash="dot", **line)
    least = 100 * search.dense.accuracy - target.budget.accuracy_drop_pp
    figure.add_hline(
        y=least, line_dash="dash", annotation_text="accuracy budget", annotation_position="bottom right", **line
    )
