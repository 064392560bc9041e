"""The plot on top of a report: accuracy against latency, or another figure, of every trial."""

from typing import Any

import plotly.graph_objects as go

from deploypipe.budgets import BUDGETS
from deploypipe.records import Trial
from deploypipe.report.plot_style import COMPRESSED, DENSE, LIMIT, as_html
from deploypipe.report.search_text import held_budgets
from deploypipe.report.trade_off import TradeOff, removed_text, summary
from deploypipe.target import Target
from deploypipe.text.amounts import amount

_OVER, _STOPPED, _FRONTIER = "#c2610c", "#7d8798", "#8b5cf6"


def trade_off_plot(trade: TradeOff, target: Target) -> str:
    """Every trial, the dense network, the frontier, the budget and the lowest accuracy that it allows."""
    figure = go.Figure()
    _add_limits(figure, trade, target)
    _add_frontier(figure, trade)
    others = [trial for trial in trade.search.trials if trial is not trade.chosen]
    fitting = [trial for trial in others if trial.feasible]
    groups: list[tuple[str, list[Trial], dict[str, object]]] = [
        ("over budget", [t for t in others if not t.feasible], {"color": _OVER, "symbol": "x-thin-open", "size": 9}),
        (
            "stopped early",
            [t for t in fitting if t.is_stopped],
            {"color": _STOPPED, "symbol": "triangle-down-open", "size": 9},
        ),
        ("within budget", [t for t in fitting if not t.is_stopped], {"color": DENSE, "symbol": "circle", "size": 9}),
        ("chosen", [trade.chosen], {"color": COMPRESSED, "symbol": "star", "size": 16}),
    ]
    for label, shown, marker in groups:
        if shown:
            _add_trials(figure, trade, shown, label, marker)
    _add_dense(figure, trade)
    figure.update_layout(xaxis_title=trade.cost_label, yaxis_title=trade.accuracy_label, hovermode="closest")
    return as_html(figure, summary(trade), height=460)


def _add_trials(figure: Any, trade: TradeOff, shown: list[Trial], label: str, marker: dict[str, object]) -> None:
    figure.add_scatter(
        x=[trade.cost_of(t.candidate) for t in shown],
        y=[100 * t.candidate.accuracy for t in shown],
        mode="markers",
        name=label,
        marker={"line": {"width": 2}, **marker} if "open" in str(marker["symbol"]) else marker,
        text=[_about(trade, t, label) for t in shown],
        hovertemplate="%{text}<extra></extra>",
    )


def _about(trade: TradeOff, trial: Trial, label: str) -> str:
    """The words that hovering shows."""
    seen = trial.candidate
    num = f" (n = {trial.num_val_samples:,})" if trial.num_val_samples else ""
    drop = amount(100 * (seen.accuracy - trade.search.dense.accuracy), "pp", signed=True)
    lines = [
        f"trial {trial.number}, {label} (to ship it: --ship-trial {trial.number})",
        f"{trade.metric} {amount(100 * seen.accuracy, '%')}, {drop}{num}",
        *(
            f"{row.label} {amount(value, row.unit)}"
            for row in BUDGETS.values()
            if (value := row.of_candidate(seen)) is not None
        ),
        "removed: " + removed_text(trial.plan).replace("; ", "<br>").replace(" (", "<br>("),
    ]
    return "<br>".join(lines)


def _add_frontier(figure: Any, trade: TradeOff) -> None:
    places = [trade.candidate_of(trial) for trial in trade.frontier]
    dearest = max(map(trade.cost_of, [trade.search.dense, *(trial.candidate for trial in trade.search.trials)]))
    figure.add_scatter(
        x=[*map(trade.cost_of, places), dearest],
        y=[100 * candidate.accuracy for candidate in (*places, places[-1])],
        mode="lines",
        name="frontier",
        line={"color": _FRONTIER, "width": 2, "shape": "hv", "dash": "dot"},
        hoverinfo="skip",
    )


def _add_dense(figure: Any, trade: TradeOff) -> None:
    dense = trade.search.dense
    figure.add_scatter(
        x=[trade.cost_of(dense)],
        y=[100 * dense.accuracy],
        mode="markers",
        name="dense",
        marker={"color": _STOPPED, "size": 12, "symbol": "diamond"},
        text=[f"dense<br>{trade.metric} {amount(100 * dense.accuracy, '%')}"],
        hovertemplate="%{text}<extra></extra>",
    )


def _add_limits(figure: Any, trade: TradeOff, target: Target) -> None:
    line = {"line_color": LIMIT, "line_width": 1.5}
    cost, name = trade.cost_of(trade.search.dense), trade.cost.name
    asked = target.budget.limits().get(name)
    held = next((budget.limit for budget in held_budgets(trade.search) if budget.name == name), None)
    if asked is not None:
        shown = f"budget {getattr(target.budget, name)}"
        figure.add_vline(x=asked.absolute(cost), line_dash="dash", annotation_text=shown, **line)
    if held is not None and (asked is None or held * cost < 0.999 * asked.absolute(cost)):
        figure.add_vline(x=held * cost, line_dash="dot", **line)
    least = 100 * trade.search.dense.accuracy - target.budget.accuracy_drop_pp
    figure.add_hline(
        y=least,
        line_dash="dash",
        annotation_text="lowest accuracy allowed in the end",
        annotation_position="bottom right",
        **line,
    )
