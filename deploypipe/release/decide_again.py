"""Decide again about a finished run: with a new baseline and waivers, or with the recorded ones and today's date."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from deploypipe.errors import BundleError, DeploypipeError
from deploypipe.export.onnx_export.parity import limit_of
from deploypipe.records import BaselineComparison, Check, GateDecision, Verdict, Waiver
from deploypipe.release.gate import decide
from deploypipe.report.html import write_report
from deploypipe.runs.result import RESULT, RunResult, save_result

_REPORT = "report.html"


def decide_again(
    run: Path,
    result: RunResult,
    baseline: BaselineComparison | None,
    waivers: Sequence[Waiver],
    now: datetime,
) -> RunResult:
    """The run's result with the new decision, which is also written to its `result.json` and its report."""
    decision = _decide(result, baseline, waivers, now)
    decided = replace(result, decision=decision, baseline=baseline)
    if decided != result:
        save_result(run, decided)
        try:
            write_report(decided, run / _REPORT)
        except DeploypipeError:  # the packages for reports are not installed: remove the outdated report
            (run / _REPORT).unlink(missing_ok=True)
    return decided


def decide_today(run: Path, result: RunResult, now: datetime) -> GateDecision:
    """The decision from the recorded measurements, baseline and waivers at `now`, which may be a later date.

    HOLD if the last decision was HOLD, a waiver has expired, or the measurements are too old by now. BundleError if the
    recorded decision does not follow from the record.
    """
    stored = result.decision
    waivers = [check.waiver for check in stored.checks if check.waiver]
    decision = _decide(result, result.baseline, waivers, now)
    if problem := _find_contradiction(stored, decision):
        raise BundleError(f"{run / RESULT}: {problem}; decide again with `deploypipe gate {run}`")
    return decision if stored.verdict is Verdict.SHIP else stored


def _decide(
    result: RunResult, baseline: BaselineComparison | None, waivers: Sequence[Waiver], now: datetime
) -> GateDecision:
    return decide(
        result.benchmark,
        result.target.budget,
        parity_limit=limit_of(result.recipe.export, result.benchmark.compressed.file.precision),
        baseline=baseline,
        waivers=waivers,
        now=now,
        fast_dev_run=result.recipe.fast_dev_run,
    )


def _find_contradiction(stored: GateDecision, now: GateDecision) -> str:
    """How the stored decision differs from the gate's now, apart from the date; empty if it does not."""
    if len(stored.checks) != len(now.checks):
        return f"{len(stored.checks)} checks are recorded, but its budget has {len(now.checks)}"
    for before, after in zip(stored.checks, now.checks, strict=True):
        if not _is_same(before, after):
            shown = (f"{check.name} {check.status.value} ({check.reason})" for check in (before, after))
            return "{} is recorded, but the recorded measurements give {}".format(*shown)
    if all(check.is_settled for check in stored.checks) is not (stored.verdict is Verdict.SHIP):
        return f"{stored.verdict.value} is recorded, but does not follow from the checks recorded with it"
    return ""


def _is_same(before: Check, after: Check) -> bool:
    """Whether two checks agree, apart from what depends on the date: the age of the measurements, and waivers."""
    if (before.name, before.limit) != (after.name, after.limit):
        return False
    figures = [math.nan if check.measured is None else check.measured for check in (before, after)]
    is_same_figure = math.isclose(*figures, rel_tol=1e-6) or all(map(math.isnan, figures))  # numpy versions may differ
    return before.name == "age" or (before.status is after.status and is_same_figure)
