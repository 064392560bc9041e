"""The report: one HTML file that tells the decision first and needs no network."""

from importlib import resources
from pathlib import Path
from typing import Any

from deploypipe.errors import DeploypipeError
from deploypipe.records import PruneReport
from deploypipe.report.tables import before_after, check_cells, count, seconds
from deploypipe.runs import RunResult, write_atomically

TEMPLATE = "report.html.j2"


def write_report(result: RunResult, path: Path) -> None:
    """Write the report of a run. DeploypipeError where plotly or jinja2 are not installed."""
    content = render_report(result).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def render_report(result: RunResult) -> str:
    """The report of a run as HTML."""
    try:
        import jinja2
        import plotly.offline
    except ImportError as error:
        raise DeploypipeError(
            f"the report needs {error.name}, which is not installed; pip install 'deploypipe[report]'"
        ) from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(count=count, seconds=seconds)
    text = (resources.files("deploypipe.report") / TEMPLATE).read_text(encoding="utf-8")
    rendered: str = environment.from_string(text).render(
        result=result,
        rows=before_after(result),
        checks=[check_cells(check) for check in result.decision.checks],
        removed_blocks=_removed_blocks(result.prune),
        remarks=[row for row in result.prune.rows if row.reason] if result.prune else [],
        total_seconds=sum(stage.seconds for stage in result.stages),
        figures=_figures(result),
        plotly_js=plotly.offline.get_plotlyjs(),
    )
    return rendered


def _removed_blocks(report: PruneReport | None) -> list[str]:
    rows = report.rows if report else ()
    return [row.name for row in rows if row.kind == "block" and row.realised < row.width_before]


def _figures(result: RunResult) -> dict[str, Any]:
    from deploypipe.report import plots

    figures: dict[str, Any] = {"stages": plots.stage_times(result.stages)}
    if result.benchmark.dense.latency or result.benchmark.compressed.latency:
        figures["latencies"] = plots.latencies(result.benchmark)
    if result.search:
        figures["trials"] = plots.trials(result.search, result.target)
    if result.prune and any(row.kind == "channels" for row in result.prune.rows):
        figures["widths"] = plots.widths(result.prune)
    if result.training and result.training.epochs:
        figures["finetune"] = plots.finetune(result.training)
    if result.repair and any(not row.reason for row in result.repair.rows):
        figures["repair"] = plots.repair_errors(result.repair)
    return figures
