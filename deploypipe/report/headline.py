"""The first lines of a report: the gate's answer in words, and one sentence that claims no more than was shown."""

from enum import StrEnum
from math import ceil, floor

from deploypipe.budgets import BUDGETS
from deploypipe.records import BenchmarkReport, GateDecision, Interval, Status, Verdict
from deploypipe.report.run_tables import HERE, check_cells
from deploypipe.runs.result import RunResult

_LEAST_SPEEDUP = 1.01  # a smaller one is "as fast as before"


class Outcome(StrEnum):
    """The meaning of a gate's decision for the reader, worst first. Values are names of colours in `page.css`."""

    FAILED = "failed"
    UNSTEADY = "unsteady"
    NOT_MEASURED = "not-measured"
    OTHER_DEVICE = "other-device"
    FAST_TRY = "plain"
    SHIP = "ship"


_HOLDS = {
    Outcome.FAILED: "failed: a figure is above its limit",
    Outcome.UNSTEADY: "not measured steadily: nothing has failed, but the times cannot decide",
    Outcome.NOT_MEASURED: "could not be measured: nothing has failed, but a figure is missing",
    Outcome.OTHER_DEVICE: "not this device: nothing has failed, but the target has to measure",
    Outcome.FAST_TRY: "a fast try: it shows that every stage works, and never ships",
}


def outcome_of(result: RunResult) -> Outcome:
    """The kind of a run's decision. One failed check makes it FAILED, whatever else is missing."""
    if result.decision.verdict is Verdict.SHIP:
        return Outcome.SHIP
    if result.recipe.fast_dev_run:
        return Outcome.FAST_TRY
    if any(check.status is Status.FAIL for check in result.decision.checks if not check.is_settled):
        return Outcome.FAILED
    if result.benchmark.compressed.latency is None:
        return Outcome.OTHER_DEVICE
    return Outcome.UNSTEADY if result.benchmark.doubts else Outcome.NOT_MEASURED


def outcome_label(decision: GateDecision, outcome: Outcome) -> str:
    """Explain the verdict in words: the gate's reason for SHIP, a fixed text for each kind of HOLD."""
    return decision.reason if outcome is Outcome.SHIP else _HOLDS[outcome]


def failed_lines(decision: GateDecision) -> list[str]:
    """Each failed check with its figure and its limit: "latency p50: 0.720x (0.710 to 0.730), limit 0.7x"."""
    failed = [check for check in decision.checks if check.status is Status.FAIL and not check.is_settled]
    return [f"{name}: {measured}, limit {limit}" for name, _, measured, limit, _ in map(check_cells, failed)]


def headline(result: RunResult) -> str:
    """Speed, size and accuracy of what ships against the dense network: "1.46x faster, 57 % smaller, ...".

    Of an interval the cautious end is stated. A figure that is unknown is called unknown.
    """
    report = result.benchmark
    if report.dense.file.identity == report.compressed.file.identity:
        return "Nothing was removed: what ships is the dense network"
    size = BUDGETS["file_size"]
    parts = (
        _speed(report),
        _size(size.value(report.dense), size.value(report.compressed)),
        _accuracy(result.metric, report, result.target.budget.accuracy_drop_pp),
    )
    sentence = ", ".join(filter(None, parts))
    return sentence[0].upper() + sentence[1:]


def _speed(report: BenchmarkReport) -> str:
    ratio = report.latency_ratio
    if ratio is None:
        return "speed unknown (not measured)"
    if report.doubts:
        return "speed unknown (not measured steadily)"
    if 1 / ratio.high >= _LEAST_SPEEDUP:
        return f"{_floored(1 / ratio.high)}x faster"
    if ratio.low > 1:
        return f"slower ({ratio.low:.3f} to {ratio.high:.3f} times the latency)"
    return f"no faster for certain ({ratio.low:.3f} to {ratio.high:.3f} times the latency)"


def _size(dense: float | None, compressed: float | None) -> str:
    if not dense or compressed is None:
        return "size unknown"
    percent = 100 * (1 - compressed / dense)
    if percent < 0:
        return f"{ceil(-percent)} % larger"
    return f"{floor(percent)} % smaller" if percent >= 1 else "no smaller"


def _accuracy(metric: str, report: BenchmarkReport, allowed_pp: float) -> str:
    if report.accuracy_drop_pp:
        return _accuracy_text(metric, report.accuracy_drop_pp, allowed_pp)
    if here := report.accuracy_here:
        return f"{_accuracy_text(metric, here.drop_pp, allowed_pp)} ({HERE})"
    return f"{metric} unknown (not measured)"


def _accuracy_text(metric: str, drop: Interval, allowed_pp: float) -> str:
    worst = ceil(round(10 * drop.high, 6)) / 10
    if drop.low > 0:
        return f"{metric} {drop.value:.1f} points worse: at most {worst:g}"
    if drop.high < 0:
        return f"{metric} better: by at least {floor(round(-10 * drop.high, 6)) / 10:g} points"
    if drop.high == 0:
        return f"{metric} unchanged or better"
    if drop.high > allowed_pp:
        return f"{metric} uncertain: up to {worst:g} points worse"
    return f"{metric} unchanged: at most {worst:g} points worse"


def _floored(times: float) -> str:
    """Rounded down, so that the figure is never more than was shown."""
    return f"{floor(times * 10) / 10:.1f}" if times >= 10 else f"{floor(times * 100) / 100:.2f}"
