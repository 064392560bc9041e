"""The report: one HTML file that tells the decision first and needs no network."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploypipe.errors import DeploypipeError
from deploypipe.files.atomic import write_atomically
from deploypipe.records import PruneReport, ScoreSummary, SearchResult
from deploypipe.report.joint_pareto import Judged, front_sentence, judged_networks
from deploypipe.report.next_steps import next_steps
from deploypipe.report.run_tables import (
    PRECISION_HEADER,
    before_after,
    check_cells,
    overview_header,
    overview_rows,
    precision_rows,
    repair_remarks,
    seconds,
    what_is_covered,
)
from deploypipe.report.score_tables import score_notes, score_table
from deploypipe.report.search_text import (
    REACH_HEADER,
    STAGE_HEADER,
    fit_sentence,
    importance_note,
    limit_sentences,
    reach_rows,
    stage_rows,
)
from deploypipe.report.width_tables import Stage, stages_of
from deploypipe.runs.result import RunResult
from deploypipe.text.amounts import count
from deploypipe.text.printable_text import printable_lines

REPORT = "report.html"
_MAX_SLICES = 30  # classes that are shown


def write_report(result: RunResult, path: Path) -> None:
    """Write the report of a run. DeploypipeError where plotly or jinja2 are not installed."""
    _write(path, render_report(result))


def write_scores(name: str, summary: ScoreSummary, path: Path) -> None:
    """Write what a scorer says about the network `name`. DeploypipeError where plotly or jinja2 are not installed."""
    _write(path, _render("scores.html.j2", lambda: _score_figures(summary), name=name, open=True, **_about(summary)))


def write_overview(name: str, results: Mapping[str, RunResult | str], path: Path) -> None:
    """Write the page that leads to the reports of one network's targets, which are in folders of their names beside it.
    DeploypipeError where plotly or jinja2 are not installed."""
    verdicts = {"ERROR" if isinstance(result, str) else result.decision.verdict.value for result in results.values()}
    worst = next(verdict for verdict in ("ERROR", "HOLD", "SHIP") if verdict in verdicts)
    rows = overview_rows(results)
    networks = judged_networks(results)
    page = _render(
        "overview.html.j2",
        lambda: _overview_figures(networks, results),
        name=name,
        worst=worst,
        header=overview_header(),
        rows=rows,
        about_front=front_sentence(networks) if networks else "",
    )
    _write(path, page)


def _overview_figures(networks: Sequence[Judged], results: Mapping[str, RunResult | str]) -> dict[str, str]:
    from deploypipe.report import search_plots

    dense = next((r.search.dense for r in results.values() if not isinstance(r, str) and r.search), None)
    return {"front": search_plots.all_targets(networks, dense)} if dense else {}


def render_report(result: RunResult) -> str:
    """The report of a run as HTML."""
    return _render(
        "report.html.j2",
        lambda: _figures(result),
        result=result,
        rows=before_after(result),
        next_steps=next_steps(result),
        checks=[check_cells(check) for check in result.decision.checks],
        most_slices=_MAX_SLICES,
        removed_blocks=_removed_blocks(result.prune),
        remarks=[row for row in result.prune.rows if row.reason] if result.prune else [],
        unrepaired=repair_remarks(result.repair) if result.repair else [],
        precisions=precision_rows(result.precision) if result.precision else [],
        precision_header=PRECISION_HEADER,
        **_about_search(result),
        latency_coverage=what_is_covered(result.benchmark.conditions),
        total_seconds=sum(stage.seconds for stage in result.stages),
        open=False,
        **_about(result.scores),
    )


def _render(template: str, figures: Callable[[], dict[str, str]], **values: Any) -> str:
    try:
        import jinja2
        import plotly.offline
    except ImportError as error:
        raise DeploypipeError(
            f"the report needs {error.name}, which is not installed; pip install 'deploypipe[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploypipe", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(count=count, seconds=seconds, report_of=_report_of)
    page = environment.get_template(template)
    return page.render(figures=figures(), plotly_js=plotly.offline.get_plotlyjs(), **values)


def _shown(value: Any) -> Any:
    """Escape hidden characters in whatever a template inserts, unless it is HTML of our own (`|safe`)."""
    return printable_lines(value) if type(value) is str else value


def _report_of(target: str) -> str:
    """The address of a target's report: always below the page, whatever the target is called."""
    return f"./{quote(target, safe='')}/{REPORT}"


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def _about(summary: ScoreSummary | None) -> dict[str, Any]:
    if summary is None:
        return {"scores": None}
    heads, rows = score_table(summary)
    return {
        "scores": summary,
        "score_columns": heads,
        "score_rows": rows,
        "notes": score_notes(summary),
    }


def _about_search(result: RunResult) -> dict[str, Any]:
    search = result.search
    if search is None:
        return {"stages": ()}
    stages = _stages(result, search)
    return {
        "stages": stages,
        "limits": limit_sentences(result, search, stages),
        "stage_header": STAGE_HEADER,
        "stage_rows": stage_rows(stages),
        "reach_header": REACH_HEADER,
        "reach_rows": reach_rows(search, result.target),
        "importance_note": importance_note(search),
        "fit_note": fit_sentence(search.latency_fit) if search.latency_fit else "",
    }


def _stages(result: RunResult, search: SearchResult) -> tuple[Stage, ...]:
    return stages_of(result.structures, search.trials[search.best].plan)


def _removed_blocks(report: PruneReport | None) -> list[str]:
    rows = report.rows if report else ()
    return [row.name for row in rows if row.kind == "block" and row.realised < row.width_before]


def _figures(result: RunResult) -> dict[str, str]:
    from deploypipe.report import plots

    figures: dict[str, str] = {"stages": plots.stage_times(result.stages)}
    if result.benchmark.dense.latency or result.benchmark.compressed.latency:
        figures["latencies"] = plots.latencies(result.benchmark)
    if any(result.benchmark.slices.values()) and result.benchmark.compressed.per_sample_metric:
        figures["slices"] = plots.slices(result.benchmark, _MAX_SLICES)
    if result.search:
        figures |= _search_figures(result, result.search)
    if result.training and result.training.epochs:
        figures["finetune"] = plots.finetune(result.training)
    if result.repair and any(not row.reason for row in result.repair.rows):
        figures["repair"] = plots.repair_errors(result.repair)
    return figures | _score_figures(result.scores)


def _search_figures(result: RunResult, search: SearchResult) -> dict[str, str]:
    from deploypipe.report import search_plots

    figures = {"trials": search_plots.trials(search, result.target, result.recipe.search.objectives)}
    if search.importances:
        figures["importances"] = search_plots.importances(search.importances)
    if search.latency_fit:
        figures["latency_fit"] = search_plots.latency_fit(search.latency_fit)
    for stage in _stages(result, search):
        if stage.layers:
            figures[f"widths of {stage.name}"] = search_plots.widths(stage)
    return figures


def _score_figures(summary: ScoreSummary | None) -> dict[str, str]:
    from deploypipe.report import plots

    if summary is None or not summary.groups:
        return {}
    figures = {"kept_information": plots.kept_information(summary)}
    if len(summary.block_names) > 1:
        figures["block_similarity"] = plots.block_similarity(summary)
    return figures
