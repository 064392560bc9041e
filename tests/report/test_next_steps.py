"""HOLD names the command to run next, for every kind of check that holds."""

from dataclasses import replace

import pytest
from finished_runs import conditions, finished_run, untouched_run

from deploypipe.records import BaselineComparison, BenchmarkReport, Interval, TrainLog
from deploypipe.release.gate import decide
from deploypipe.report.html import render_report
from deploypipe.report.next_steps import next_steps
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget

COMMAND = "deploypipe run digits x86_cpu --set target.num_threads=2"


def held(report: BenchmarkReport, budget: Budget, baseline: BaselineComparison | None = None) -> RunResult:
    run = finished_run()
    decision = decide(report, budget, parity_limit=1e-3, baseline=baseline)
    target = replace(run.target, budget=budget)
    training = TrainLog(epochs=(), chosen_epoch=0)
    return replace(
        run, benchmark=report, target=target, decision=decision, baseline=baseline, training=training, command=COMMAND
    )


REPORT = finished_run().benchmark
NOISY = replace(REPORT, conditions=conditions("noisy", "others kept 1.9 of 2 processors busy"), is_steady=False)
UNPAIRED = replace(REPORT, dense=replace(REPORT.dense, peak_memory_mib=None))
APART = replace(REPORT, compressed=replace(REPORT.compressed, file=replace(REPORT.compressed.file, max_abs_error=0.1)))
EASY = Budget(accuracy_drop_pp=50.0)


@pytest.mark.parametrize(
    ("report", "budget", "starts", "ends"),
    [
        (NOISY, replace(EASY, latency_p50="0.9x"), "latency p50: measure again when the", f": {COMMAND}"),
        (REPORT, replace(EASY, latency_p50="0.1x"), "latency p50: search longer", "--set search.num_trials=48"),
        (REPORT, replace(EASY, latency_p50="0.5x"), "latency p50: the limit lies within", f"{COMMAND} --remeasure"),
        (REPORT, Budget(accuracy_drop_pp=0.0), "accuracy drop: train longer", "--set finetune.num_epochs="),
        (REPORT, replace(EASY, max_age_days=1.0), "age: see the reason", f"{COMMAND} --remeasure"),
        (UNPAIRED, replace(EASY, peak_memory="0.9x"), "peak memory: see the reason", f"{COMMAND} --remeasure"),
        (APART, EASY, "parity: use another precision", f"{COMMAND} --set target.precisions='[\"fp32\"]'"),
        (REPORT, replace(EASY, slice_drop_pp=1.0), "slice drop: give every slice", f": {COMMAND}"),
    ],
)
def test_each_check_that_holds_has_its_command(report: BenchmarkReport, budget: Budget, starts: str, ends: str) -> None:
    run = held(report, budget)
    run = replace(run, recipe=replace(run.recipe, search=replace(run.recipe.search, num_trials=24)))
    (step,) = next_steps(run)
    assert step.startswith(starts) and ends in step and COMMAND in step
    assert f"Next: {step.partition(COMMAND)[0]}{COMMAND}" in render_report(run).replace("&#39;", "'")


def test_on_another_machine_all_checks_share_the_way_to_the_device() -> None:
    budget = Budget(latency_p50="0.5x", peak_memory="0.5x", accuracy_drop_pp=1.0)
    (step,) = next_steps(held(untouched_run().benchmark, budget))
    assert step == f"latency p50, peak memory, accuracy drop: run it on the device, x86_cpu: {COMMAND}"


def test_a_comparison_that_was_not_possible_names_the_gate() -> None:
    ratio = Interval(value=1.0, low=0.9, high=1.1)
    before = BaselineComparison(name="v1", latency_ratio=ratio, accuracy_drop_pp=ratio, latency_doubts="it drifted")
    (step,) = next_steps(held(REPORT, EASY, before))
    assert step.startswith("latency against baseline: ") and "`deploypipe gate`" in step


def test_ship_has_none_and_the_library_is_called_again() -> None:
    assert next_steps(held(REPORT, replace(EASY, latency_p50="0.9x"))) == ()
    called = replace(held(REPORT, replace(EASY, latency_p50="0.5x")), command="")
    assert next_steps(called)[0].endswith("call compress() as before, with remeasure=True")


def test_what_was_measured_is_never_called_not_measured() -> None:
    """The pruned network's memory was measured; that of the dense one, which the limit is a share of, was not."""
    for report, limits in ((NOISY, {"latency_p50": "0.9x"}), (UNPAIRED, {"peak_memory": "0.9x"})):
        check = decide(report, replace(EASY, **limits)).checks[0]
        assert check.status.value == "UNKNOWN" and check.measured is not None
        assert "not measured" not in check.reason.partition(";")[0] or "dense network's" in check.reason
