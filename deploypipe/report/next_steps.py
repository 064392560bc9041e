"""Advise what to do about a run on HOLD: a sentence for each failed check, ending with the next command."""

from deploypipe.budgets import BUDGETS
from deploypipe.records import Check, Status, Verdict
from deploypipe.report.search_text import stopped_by_time
from deploypipe.runs.full_run_command import full_run_command
from deploypipe.runs.result import RunResult

_AGAIN = "--remeasure"
_ACCURACIES = ("accuracy_drop", "accuracy_against_baseline", "slice_drop")
_COMPARED = ("latency_against_baseline", "accuracy_against_baseline")


def next_steps(result: RunResult) -> tuple[str, ...]:
    """The sentences; none for SHIP. Checks with the same remedy share one."""
    if result.decision.verdict is Verdict.SHIP:
        return ()
    names: dict[str, list[str]] = {}
    for check in result.decision.checks:
        if not check.is_settled:
            remedy = _for_unknown(result, check) if check.status is Status.UNKNOWN else _for_failed(result, check)
            names.setdefault(remedy, []).append(check.name.replace("_", " "))
    return tuple(f"{', '.join(checks)}: {remedy}" for remedy, checks in names.items())


def _for_failed(result: RunResult, check: Check) -> str:
    if result.recipe.fast_dev_run:
        return _real_run(result)
    budget = f"budget.{check.name}" if check.name in result.target.budget.limits() else "the limit"
    if check.name == "age":
        return f"measure again: {_command(result, _AGAIN)}"
    if check.name == "parity":
        command = _command(result, "target.precisions", "'[\"fp32\"]'")
        return f"use another precision, or raise export.max_abs_error: {command}"
    is_figure = check.name in BUDGETS or check.name == "latency_against_baseline"
    if is_figure and check.interval and check.limit is not None and check.interval.low <= check.limit:
        return f"the limit lies within its interval; measure again, or relax {budget}: {_command(result, _AGAIN)}"
    if is_figure and result.search and result.search.winner is not None:
        return f"ship another trial (--ship-trial), or relax {budget}: {_command(result)}"
    minutes = result.recipe.search.max_minutes
    if is_figure and minutes and result.search and stopped_by_time(result, result.search):
        return f"search longer, or relax {budget}: {_command(result, 'search.max_minutes', 2 * minutes)}"
    if is_figure and result.search:
        num_trials = 2 * result.recipe.search.num_trials
        return f"search longer, or relax {budget}: {_command(result, 'search.num_trials', num_trials)}"
    if check.name in _ACCURACIES and result.training:
        num_epochs = 2 * max(result.recipe.finetune.num_epochs, 1)
        return f"train longer, or relax {budget}: {_command(result, 'finetune.num_epochs', num_epochs)}"
    return f"relax {budget} in the target, then: {_command(result)}"


def _for_unknown(result: RunResult, check: Check) -> str:
    if result.recipe.fast_dev_run:
        return _real_run(result)
    is_shaky = bool(result.benchmark.doubts) and check.measured is not None
    if check.name in _COMPARED:
        return "run the same `deploypipe gate` command again when the machine is quiet and both can be compared"
    if check.name in BUDGETS and BUDGETS[check.name].source == "timed" and is_shaky:
        return f"measure again when the machine is quiet: {_command(result)}"
    if result.benchmark.compressed.latency is None:
        return f"run it on the device, {result.target.name or result.target.runtime}: {_command(result)}"
    if check.name == "slice_drop":
        return f"give every slice at least two test samples, then: {_command(result)}"
    return f"see the reason; run on a machine that can measure it, or without its limit: {_command(result, _AGAIN)}"


def _real_run(result: RunResult) -> str:
    command = full_run_command(result.command) or "call compress() without fast_dev_run, with another folder"
    return f"every stage works; for a result that can ship: {command}"


def _command(result: RunResult, option: str = "", value: object = None) -> str:
    """The command that made the run, with --remeasure or one more setting."""
    if not result.command:  # the library was called
        extra = {"": "", _AGAIN: ", with remeasure=True"}.get(option, f", with {option} = {value}")
        return f"call compress() as before{extra}"
    if value is not None:
        option = f"--set {option}={value}"
    return f"{result.command} {option}".strip()
