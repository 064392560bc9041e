"""The report: one HTML file that states the decision first and needs no network."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploypipe.errors import DeploypipeError
from deploypipe.files.atomic import write_atomically
from deploypipe.records import PruneReport, ScoreSummary
from deploypipe.report.headline import Outcome, failed_lines, headline, outcome_label, outcome_of
from deploypipe.report.joint_pareto import evaluated_networks, front_sentence
from deploypipe.report.next_steps import next_steps
from deploypipe.report.page_contents import Contents
from deploypipe.report.run_tables import (
    PRECISION_HEADER,
    before_after,
    check_rows,
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
    margin_sentence,
    reach_rows,
    stage_rows,
)
from deploypipe.report.trade_off import ship_another, trade_off, trade_off_header, trade_off_rows
from deploypipe.report.width_tables import stages_of
from deploypipe.runs.result import RunResult
from deploypipe.text.amounts import count, mebibytes
from deploypipe.text.printable_text import printable_lines

REPORT = "report.html"
_BEFORE_UNIT = re.compile(r"(?<=[0-9]) (?=(?:ms|MiB|pp|%|[kMG])(?![A-Za-z0-9]))")
_MAX_SLICES = 30  # classes that are shown


def write_report(result: RunResult, path: Path) -> None:
    """Write the report of a run. DeploypipeError if plotly or jinja2 is not installed."""
    _write(path, render_report(result))


def write_scores(name: str, summary: ScoreSummary, path: Path) -> None:
    """Write what a scorer says about the network `name`. DeploypipeError if plotly or jinja2 is not installed."""

    def figures() -> dict[str, str]:
        from deploypipe.report.page_figures import score_figures  # late: brings plotly

        return score_figures(summary)

    _write(path, _render("scores.html.j2", figures, name=name, open=True, **_about(summary)))


def write_overview(name: str, results: Mapping[str, RunResult | str], path: Path) -> None:
    """Write the page that links the reports of one network's targets, which are in folders of their names next to it.

    DeploypipeError if plotly or jinja2 is not installed.
    """

    def figures() -> dict[str, str]:
        from deploypipe.report.page_figures import overview_figures

        return overview_figures(networks, results)

    verdicts = {"ERROR" if isinstance(result, str) else result.decision.verdict.value for result in results.values()}
    worst = next(verdict for verdict in ("ERROR", "HOLD", "SHIP") if verdict in verdicts)
    networks = evaluated_networks(results)
    page = _render(
        "overview.html.j2",
        figures,
        name=name,
        worst=worst,
        outcome=_worst_outcome(results).value,
        header=overview_header(),
        rows=overview_rows(results),
        about_front=front_sentence(networks) if networks else "",
    )
    _write(path, page)


def render_report(result: RunResult) -> str:
    """The report of a run as HTML."""

    def figures() -> dict[str, str]:
        from deploypipe.report.page_figures import run_figures

        return run_figures(result, _MAX_SLICES)

    outcome = outcome_of(result)
    return _render(
        "report.html.j2",
        figures,
        result=result,
        rows=before_after(result),
        outcome=outcome.value,
        outcome_label=outcome_label(result.decision, outcome),
        headline=headline(result),
        failed=failed_lines(result.decision),
        next_steps=next_steps(result),
        checks=check_rows(result.decision.checks),
        other_notes=_notes_that_no_check_has(result),
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
        import plotly.offline

        page = _environment().get_template(template)
        drawn = figures()
    except ImportError as error:
        raise DeploypipeError(
            f"the report needs {error.name}, which is not installed; pip install 'deploypipe[report]'"
        ) from None
    filled: str = page.render(figures=drawn, plotly_js=plotly.offline.get_plotlyjs(), contents=Contents(), **values)
    return filled


@cache
def _environment() -> Any:
    """The page's templates: they take longer to compile than to fill in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploypipe", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        count=count, seconds=seconds, report_of=_report_of, mebibytes=mebibytes, unbroken=_unbroken
    )
    return environment


def _worst_outcome(results: Mapping[str, RunResult | str]) -> Outcome:
    outcomes = {Outcome.FAILED if isinstance(result, str) else outcome_of(result) for result in results.values()}
    return next(outcome for outcome in Outcome if outcome in outcomes)


def _shown(value: Any) -> Any:
    """Escape hidden characters in whatever a template inserts, unless it is HTML of our own (`|safe`)."""
    return printable_lines(value) if type(value) is str else value


def _unbroken(cell: str) -> str:
    """A cell whose figures stay on one line with their units."""
    return _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", cell)


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
    return {"scores": summary, "score_columns": heads, "score_rows": rows, "notes": score_notes(summary)}


def _about_search(result: RunResult) -> dict[str, Any]:
    search = result.search
    if search is None:
        return {"stages": ()}
    stages = stages_of(result.structures, search.trials[search.best].plan)
    trade = trade_off(search, result.target, result.metric)
    return {
        "trade": trade,
        "trade_header": trade_off_header(trade),
        "trade_rows": trade_off_rows(trade),
        "ship_another": ship_another(result),
        "stages": stages,
        "limits": limit_sentences(result, search, stages),
        "stage_header": STAGE_HEADER,
        "stage_rows": stage_rows(stages),
        "reach_header": REACH_HEADER,
        "reach_rows": reach_rows(search, result.target),
        "margins": margin_sentence(result.target),
        "importance_note": importance_note(search),
        "fit_note": fit_sentence(search.latency_fit) if search.latency_fit else "",
    }


def _removed_blocks(report: PruneReport | None) -> list[str]:
    rows = report.rows if report else ()
    return [row.name for row in rows if row.kind == "block" and row.realised < row.width_before]


def _notes_that_no_check_has(result: RunResult) -> list[str]:
    """A reason that the gate states is not stated again."""
    stated = [check.reason for check in result.decision.checks]
    return [note for note in result.benchmark.notes if not any(note in reason for reason in stated)]
