"""The look that all plots share, and the summary in words that each of them has."""

import hashlib
from html import escape
from typing import Any

from deploypipe.text.printable_text import printable

# Each can be seen on the white page and on the dark one. Text, grid and frames get their colours from `page.css`.
DENSE, COMPRESSED, MUTED, LIMIT = "#7d8798", "#3b76f0", "#9aa5b5", "#e5484d"
PALE = "rgba(125, 135, 152, 0.22)"
_CONFIG = {"displayModeBar": False, "responsive": True}  # its buttons would lie over the legend


def as_html(figure: Any, summary: str, height: int = 380, top: int = 30) -> str:
    """The plot as a fragment, with `summary` below it for readers who cannot see it or have no scripts."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 10, "r": 10, "t": top, "b": 10},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        hoverlabel={"bgcolor": "#1f2937", "bordercolor": DENSE, "font": {"color": "#ffffff"}, "align": "left"},
    )
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(automargin=True)
    name = "figure-" + hashlib.sha256(figure.to_json().encode()).hexdigest()[:16]  # the same figure, the same bytes
    _show_names_as_text(figure)
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=name)
    words = escape(printable(summary[:1].upper() + summary[1:]), quote=False)
    return (
        f'<figure class="plot"><div class="drawn" role="img" aria-labelledby="{name}-summary">{plot}</div>'
        f'<figcaption id="{name}-summary">{words}</figcaption></figure>'
    )


def as_text(label: str) -> str:
    """A label without markup: plotly reads HTML in labels. Only our own line breaks stay."""
    return "<br>".join(escape(printable(part), quote=False) for part in label.split("<br>"))


def _show_names_as_text(figure: Any) -> None:
    for trace in figure.data:
        for field in ("name", "text", "x", "y", "customdata"):
            value = getattr(trace, field, None)
            if isinstance(value, str):
                trace[field] = as_text(value)
            elif value is not None and any(isinstance(item, str) for item in value):
                trace[field] = [as_text(item) if isinstance(item, str) else item for item in value]
    for shape in figure.layout.shapes:  # at a label's place
        for field in ("x0", "x1", "y0", "y1"):
            if isinstance(shape[field], str):
                shape[field] = as_text(shape[field])
    _show_axes_as_text(figure)


def _show_axes_as_text(figure: Any) -> None:
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if axis.title.text is not None:
            axis.title.text = as_text(axis.title.text)
        if axis.ticktext is not None:
            axis.ticktext = [as_text(str(item)) for item in axis.ticktext]
