"""A finished run is decided about again, and remembers it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from deploypipe.errors import DeploypipeError
from deploypipe.export.parity import limit_of
from deploypipe.records import BaselineComparison, Waiver
from deploypipe.release.gate import decide
from deploypipe.report.html import write_report
from deploypipe.runs import RunResult, save_result

_REPORT = "report.html"


def decide_again(
    run: Path,
    result: RunResult,
    baseline: BaselineComparison | None,
    waivers: Sequence[Waiver],
    now: datetime,
) -> RunResult:
    """The run's result with the new decision; its `result.json` and its report have it too."""
    decision = decide(
        result.benchmark,
        result.target.budget,
        parity_limit=limit_of(result.recipe.export, result.benchmark.compressed.file.precision),
        baseline=baseline,
        waivers=waivers,
        now=now,
    )
    decided = replace(result, decision=decision, baseline=baseline)
    if decided != result:
        save_result(run, decided)
        try:
            write_report(decided, run / _REPORT)
        except DeploypipeError:  # the packages for it are not installed: then no run has one
            (run / _REPORT).unlink(missing_ok=True)
    return decided
