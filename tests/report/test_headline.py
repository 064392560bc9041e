"""The first lines of a report claim what the intervals support, and no more."""

import re
from dataclasses import replace

import pytest
from finished_runs import conditions, finished_run, interval, untouched_run
from hypothesis import given
from hypothesis import strategies as st

from deploypipe.recipe import Recipe
from deploypipe.records import AccuracyHere, BenchmarkReport, Interval
from deploypipe.release.gate import decide
from deploypipe.report.headline import Outcome, failed_lines, headline, outcome_label, outcome_of
from deploypipe.report.html import render_report
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget

RUN = finished_run()
REPORT = RUN.benchmark
UNTIMED = replace(REPORT.compressed, latency=None, peak_memory_mib=None, accuracy=None, per_sample_metric=())
NOISY = replace(REPORT, conditions=conditions("noisy", "others kept 1.9 of 2 processors busy"), is_steady=False)
ELSEWHERE = replace(
    REPORT,
    dense=replace(UNTIMED, file=REPORT.dense.file),
    compressed=UNTIMED,
    latency_ratio=None,
    accuracy_drop_pp=None,
    notes=("this machine is x86_64, the target is aarch64",),
)


def run_of(report: BenchmarkReport, budget: Budget) -> RunResult:
    target = replace(RUN.target, budget=budget)
    return replace(RUN, benchmark=report, target=target, decision=decide(report, budget))


def said(**changes: Interval | None) -> str:
    return headline(replace(RUN, benchmark=replace(REPORT, **changes)))


def test_a_good_run_is_one_sentence() -> None:
    assert headline(RUN) == "1.96x faster, 50 % smaller, top-1 accuracy unchanged: at most 0.6 points worse"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Interval(value=0.672, low=0.66, high=0.684), "1.46x faster"),  # 1 / 0.684 = 1.4619
        (Interval(value=0.05, low=0.04, high=0.06), "16.6x faster"),  # 16.67
        (interval(0.995, 0.001), "No faster for certain (0.994 to 0.996 times the latency)"),
        (interval(1.0, 0.03), "No faster for certain (0.970 to 1.030 times the latency)"),
        (interval(1.2, 0.1), "Slower (1.100 to 1.300 times the latency)"),
        (None, "Speed unknown (not measured)"),
    ],
)
def test_speed_is_that_of_the_cautious_end(ratio: Interval | None, words: str) -> None:
    assert said(latency_ratio=ratio).startswith(f"{words}, 50 % smaller")


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        (Interval(value=0.0, low=-0.3, high=0.31), "unchanged: at most 0.4 points worse"),
        (Interval(value=0.5, low=0.2, high=0.8), "0.5 points worse: at most 0.8"),
        (Interval(value=-0.9, low=-1.4, high=-0.27), "better: by at least 0.2 points"),
        (Interval(value=0.1, low=-4.0, high=4.2), "uncertain: up to 4.2 points worse"),  # 2 points are allowed
        (None, "unknown (not measured)"),
    ],
)
def test_accuracy_is_that_of_the_cautious_end(drop: Interval | None, words: str) -> None:
    assert said(accuracy_drop_pp=drop).endswith(f"top-1 accuracy {words}")


@given(low=st.floats(0.01, 3), width=st.floats(0, 2), worse=st.floats(-5, 5))
def test_no_figure_is_better_than_its_interval(low: float, width: float, worse: float) -> None:
    ratio = Interval(value=low + width / 2, low=low, high=low + width)
    drop = Interval(value=worse, low=worse - width, high=worse + width)
    text = said(latency_ratio=ratio, accuracy_drop_pp=drop)
    if found := re.match(r"([\d.]+)x faster", text):
        assert float(found[1]) <= 1 / ratio.high + 1e-9
    if found := re.search(r"(?:at most|up to) ([\d.]+)", text):
        assert float(found[1]) >= drop.high - 1e-6
    if found := re.search(r"by at least ([\d.]+)", text):
        assert float(found[1]) <= -drop.high + 1e-6


def test_noise_leaves_the_speed_unknown() -> None:
    assert headline(run_of(NOISY, Budget(latency_p50="0.9x"))).startswith("Speed unknown (not measured steadily), 50 %")
    assert headline(untouched_run()).startswith("Nothing was removed")


def test_an_accuracy_measured_elsewhere_says_so() -> None:
    half = Interval(value=0.5, low=0.4, high=0.6)
    drop = Interval(value=0.1, low=-0.2, high=0.4)
    here = AccuracyHere(dense=half, compressed=half, drop_pp=drop, num_samples=500)
    said = headline(run_of(replace(ELSEWHERE, accuracy_here=here), Budget(accuracy_drop_pp=2.0)))
    assert said.endswith("unchanged: at most 0.4 points worse (on this machine, not on the device)")


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (run_of(REPORT, Budget(latency_p50="0.9x", accuracy_drop_pp=2.0)), Outcome.SHIP),
        (run_of(REPORT, Budget(latency_p50="0.4x", accuracy_drop_pp=2.0)), Outcome.FAILED),
        (run_of(NOISY, Budget(latency_p50="0.9x", accuracy_drop_pp=2.0)), Outcome.UNSTEADY),
        (run_of(NOISY, Budget(latency_p50="0.9x", accuracy_drop_pp=0.0)), Outcome.FAILED),  # whatever is missing
        (run_of(REPORT, Budget(slice_drop_pp=1.0, accuracy_drop_pp=2.0)), Outcome.NOT_MEASURED),
        (run_of(ELSEWHERE, Budget(latency_p50="0.9x", peak_memory="0.9x")), Outcome.OTHER_DEVICE),
        (replace(run_of(REPORT, Budget(latency_p50="0.4x")), recipe=Recipe(fast_dev_run=True)), Outcome.FAST_TRY),
    ],
)
def test_hold_has_kinds_with_words_and_colours_of_their_own(run: RunResult, outcome: Outcome) -> None:
    assert outcome_of(run) is outcome
    page = render_report(run)
    assert f'<div class="hero {outcome.value}">' in page and outcome_label(run.decision, outcome) in page
    assert outcome is Outcome.FAST_TRY or f".hero.{outcome.value} {{ background" in page  # its colour
    for line in failed_lines(run.decision):
        assert line in page


def test_a_reason_is_stated_once() -> None:
    run = run_of(ELSEWHERE, Budget(latency_p50="0.9x", peak_memory="0.9x"))
    (note,) = ELSEWHERE.notes
    assert len(run.decision.checks) == 3 and all(note in check.reason for check in run.decision.checks)
    assert render_report(run).count(note) == 1 and run.decision.reason.count(note) == 1
    spare = run_of(replace(ELSEWHERE, notes=("the clock was set",)), Budget(params="0.9x", accuracy_drop_pp=2.0))
    assert render_report(replace(spare, decision=RUN.decision)).count("the clock was set") == 1
