"""What the gate is asked later: against the bundle before, of slices and age, and with waivers."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.benchmark import latency
from deploypipe.benchmark.environment import describe_environment
from deploypipe.benchmark.latency import Timings, read_state
from deploypipe.cli import app
from deploypipe.errors import BundleError, ConfigError
from deploypipe.numerics.intervals import interval_of_drop_pp
from deploypipe.records import BaselineComparison, BenchmarkReport, Check, Interval, Status, Verdict, Waiver
from deploypipe.release.baseline_comparison import check_approved_latency, compare_with_baseline
from deploypipe.release.bundle import make_bundle
from deploypipe.release.decide_again import decide_again
from deploypipe.release.gate import decide
from deploypipe.release.waivers import load_waivers
from deploypipe.runs.result import RESULT, load_result, save_result
from deploypipe.target import Budget
from deploypipe.text.sealed_json import seal, unseal

MEASURED = datetime(2026, 11, 20, 12, tzinfo=UTC)
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkReport:
    return write_run(tmp_path_factory.mktemp("report") / "run").benchmark


def status(report: BenchmarkReport, name: str, **asked: object) -> tuple[Status, str]:
    decision = decide(report, **asked)  # type: ignore[arg-type]
    check = next(check for check in decision.checks if check.name == name)
    return check.status, check.reason


def test_the_worst_slice_counts(report: BenchmarkReport) -> None:
    budget = Budget(slice_drop_pp=2.0)
    assert status(report, "slice_drop", budget=budget)[0] is Status.PASS
    # ten more are wrong, all of one class: 2 points of all samples, 4 of that class
    metric = (1.0,) * 480 + (0.0,) * 20
    worse = replace(report, compressed=replace(report.compressed, per_sample_metric=metric))
    found, reason = status(worse, "slice_drop", budget=budget)
    assert found is Status.FAIL and reason.startswith("class 1 (250 samples)") and "1 of 2 slices" in reason
    assert status(replace(report, slices={}), "slice_drop", budget=budget)[0] is Status.UNKNOWN
    failing = replace(worse, slices={**worse.slices, "class 2": (1,)})
    found, reason = status(failing, "slice_drop", budget=budget)
    assert found is Status.FAIL and reason.endswith("fewer than 2 test samples in class 2")


@pytest.mark.parametrize("others", [{"class 2": (7,)}, {"class 2": (), "night": (1,)}])
def test_a_slice_of_one_sample_or_none_is_unknown_and_named(
    others: dict[str, tuple[int, ...]], report: BenchmarkReport
) -> None:
    for slices in ({**report.slices, **others}, others):
        found, reason = status(replace(report, slices=slices), "slice_drop", budget=Budget(slice_drop_pp=2.0))
        assert found is Status.UNKNOWN and reason.endswith(f"fewer than 2 test samples in {', '.join(others)}")


@pytest.mark.parametrize("metric", [(1.0,) * 40, (0.9,) * 40], ids=["hits", "fractions"])
def test_a_slice_too_small_for_the_limit_fails_and_says_how_many_it_takes(
    metric: tuple[float, ...], report: BenchmarkReport
) -> None:
    """No sample differs, and 40 could hide a loss of several points all the same."""
    same = replace(
        report,
        dense=replace(report.dense, per_sample_metric=metric),
        compressed=replace(report.compressed, per_sample_metric=metric),
        accuracy_drop_pp=interval_of_drop_pp(metric, metric),
        slices={"night": tuple(range(40))},
    )
    for name, budget in (
        ("slice_drop", Budget(slice_drop_pp=1.0, accuracy_drop_pp=50)),
        ("accuracy_drop", Budget(accuracy_drop_pp=1.0)),
    ):
        found, reason = status(same, name, budget=budget)
        assert found is Status.FAIL and "40 samples are too few: even without any loss it takes about 35" in reason
    assert status(same, "slice_drop", budget=Budget(slice_drop_pp=10.0))[0] is Status.PASS


@pytest.mark.parametrize(
    ("days", "expected"), [(0, Status.PASS), (29, Status.PASS), (31, Status.FAIL), (-2, Status.UNKNOWN)]
)
def test_old_measurements_and_clocks_in_the_past(days: int, expected: Status, report: BenchmarkReport) -> None:
    now = MEASURED + timedelta(days=days)
    assert status(report, "age", budget=Budget(max_age_days=30), now=now)[0] is expected
    undated = replace(report, measured_at="")
    assert status(undated, "age", budget=Budget(max_age_days=30), now=now)[0] is Status.UNKNOWN


def test_a_file_that_computes_something_else_is_held(tmp_path: Path) -> None:
    result = write_run(tmp_path / "run")
    shipped = result.benchmark.compressed
    for error, verdict in ((2e-5, Verdict.SHIP), (2e-2, Verdict.HOLD)):
        measured = replace(shipped, file=replace(shipped.file, max_abs_error=error))
        other = replace(result, benchmark=replace(result.benchmark, compressed=measured))
        assert decide_again(tmp_path / "run", other, None, (), MEASURED).decision.verdict is verdict


EDITS: list[tuple[Callable[[Any], object], str]] = [
    (lambda c: c["benchmark"].update(measured_at="yesterday"), "measured_at = 'yesterday' is not a time"),
    (lambda c: c["benchmark"]["compressed"].update(per_sample_metric=[1.0] * 400), "has 400 and 500 values"),
    (lambda c: c["benchmark"].update(slices={"a": [10**9]}), "'a' holds a number that no test sample has"),
    (lambda c: c["benchmark"].update(slices={"a": [-1, 1]}), "'a' holds a number that no test sample has"),
    (lambda c: c["stages"][0].update(seconds={"not_finite": "nan"}), "seconds = nan of 'baseline' is not finite"),
]


@pytest.mark.parametrize(("edit", "told"), EDITS)
def test_a_result_edited_and_sealed_again_that_does_not_fit_together_is_one_error(
    edit: Callable[[Any], object], told: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "run")
    path = tmp_path / "run" / RESULT
    content = json.loads(unseal(path.read_bytes()))
    edit(content)
    path.write_bytes(seal(json.dumps(content)))
    for command in ("gate", "release", "report"):
        done = CliRunner().invoke(app, [command, str(tmp_path / "run")])
        assert done.exit_code == 2 and "Traceback" not in done.output
        [error] = done.output.splitlines()
        assert error.startswith("error: ") and told in error


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


def test_nothing_may_be_worse_than_before(report: BenchmarkReport) -> None:
    good = BaselineComparison(name="v1", latency_ratio=interval(0.9, 1.04), accuracy_drop_pp=interval(-1, 0.5))
    assert decide(report, Budget(), baseline=good).verdict is Verdict.SHIP
    slow = replace(good, latency_ratio=interval(1.0, 1.06))
    found, reason = status(report, "latency_against_baseline", budget=Budget(), baseline=slow)
    assert found is Status.FAIL and reason.startswith("compared with v1: ")
    worse = replace(good, accuracy_drop_pp=interval(0.5, 1.5))
    assert status(report, "accuracy_against_baseline", budget=Budget(), baseline=worse)[0] is Status.FAIL
    other = replace(good, accuracy_drop_pp=None, notes=("accuracy: another test split",))
    found, reason = status(report, "accuracy_against_baseline", budget=Budget(), baseline=other)
    assert found is Status.UNKNOWN and "another test split" in reason


def test_a_run_is_compared_with_a_bundle(tmp_path: Path) -> None:
    write_run(tmp_path / "v1")
    bundle = make_bundle(tmp_path / "v1", tmp_path / "bundles")
    result = write_run(tmp_path / "v2", seed=1, num_wrong=5)
    found = compare_with_baseline(tmp_path / "v2", result, bundle)
    assert found.accuracy_drop_pp and found.accuracy_drop_pp.value == pytest.approx(1.0)
    assert found.latency_ratio  # also on a machine that is not steady
    elsewhere = replace(result, benchmark=replace(result.benchmark, test_data="other"))
    found = compare_with_baseline(tmp_path / "v2", elsewhere, bundle)
    assert found.accuracy_drop_pp is None and "test split" in found.notes[0]
    (tmp_path / "v2" / "model.onnx").write_bytes((tmp_path / "v1" / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"v2/model\.onnx: is not the file that was measured"):
        compare_with_baseline(tmp_path / "v2", result, bundle)


def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on another process keeps all processors busy while anything is timed."""
    state, clock = read_state(), itertools.count()
    monkeypatch.setattr(latency, "_ATTEMPTS", 1)
    monkeypatch.setattr(
        latency, "read_state", lambda: replace(state, at_s=10.0 * next(clock), busy_s=1e4 * next(clock), own_s=0.0)
    )


def test_a_comparison_on_a_noisy_machine_is_unknown_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: BenchmarkReport
) -> None:
    result = write_run(tmp_path / "v1")
    bundle = make_bundle(tmp_path / "v1", tmp_path / "bundles")
    busy(monkeypatch)
    found = compare_with_baseline(tmp_path / "v1", result, bundle)
    assert found.latency_ratio and "other processes kept" in found.latency_doubts
    decision = decide(report, Budget(latency_regression=100.0), baseline=found)
    check = next(check for check in decision.checks if check.name == "latency_against_baseline")
    assert check.status is Status.UNKNOWN and check.interval == found.latency_ratio
    assert "the timings were not steady: " in check.reason and "other processes kept" in check.reason
    assert "not compared" not in check.reason


def test_the_approved_latency_needs_its_whole_interval_and_a_quiet_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = write_run(tmp_path / "run")
    device = describe_environment(1).device_fingerprint
    environment = replace(result.benchmark.environment, device_fingerprint=device)
    save_result(tmp_path / "run", replace(result, benchmark=replace(result.benchmark, environment=environment)))
    bundle = make_bundle(tmp_path / "run", tmp_path / "bundles")
    approved = result.benchmark.compressed.latency
    assert approved
    limit = approved.p50_ms.high * 1.05

    def now(factor: float, spread: float) -> Check:
        samples = limit * factor * (1 + np.random.default_rng(0).normal(scale=spread, size=400))
        timings = Timings(samples=(samples,), block=20)
        monkeypatch.setattr(latency, "time_interleaved", lambda *_: timings)
        return check_approved_latency(bundle)

    assert now(0.8, 0.01).status is Status.PASS
    assert now(1.2, 0.01).status is Status.FAIL
    check = now(1.0, 0.01)
    assert check.status is Status.UNKNOWN and check.measured == pytest.approx(limit, rel=0.01)
    monkeypatch.undo()
    busy(monkeypatch)
    check = check_approved_latency(bundle)
    assert check.status is Status.UNKNOWN and check.measured and "other processes kept" in check.reason


WAIVER = Waiver(check="accuracy_drop", reason="known", by="ada", granted="2026-11-01", expires="2026-11-30")


@pytest.mark.parametrize(
    ("today", "verdict", "told"),
    [
        (date(2026, 11, 1), Verdict.SHIP, "the rest is waived: accuracy_drop failed"),
        (date(2026, 11, 30), Verdict.SHIP, "the rest is waived"),
        (date(2026, 12, 1), Verdict.HOLD, "the waiver by ada expired on 2026-11-30"),
        (date(2026, 10, 31), Verdict.HOLD, "the waiver by ada starts on 2026-11-01, and today is 2026-10-31"),
    ],
)
def test_a_waiver_counts_for_its_time(today: date, verdict: Verdict, told: str, report: BenchmarkReport) -> None:
    now = datetime.combine(today, datetime.min.time(), UTC)
    strict = Budget(accuracy_drop_pp=0.0)
    assert decide(report, strict, now=now).verdict is Verdict.HOLD
    decision = decide(report, strict, waivers=[WAIVER], now=now)
    assert decision.verdict is verdict and told in decision.reason
    other = replace(WAIVER, check="latency_p50")
    assert decide(report, strict, waivers=[other], now=now).verdict is Verdict.HOLD


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('by = ""', r"waiver\.0\.by.*is empty"),
        ('expires = "soon"', r"waiver\.0\.expires.*'soon' is not a date"),
        ("expires = 2026-10-01", "is before the date granted"),
        ("until = 2026-10-01", "until"),
    ],
)
def test_waivers_that_say_too_little_are_refused(line: str, told: str, tmp_path: Path) -> None:
    lines = {"check": '"age"', "reason": '"r"', "by": '"b"', "granted": "2026-11-01", "expires": "2026-11-30"}
    name, _, value = line.partition(" = ")
    path = tmp_path / "waivers.toml"
    path.write_text("[[waiver]]\n" + "\n".join(f"{key} = {text}" for key, text in (lines | {name: value}).items()))
    with pytest.raises(ConfigError, match=told):
        load_waivers(path)


def test_the_command_remembers_and_tells(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = write_run(run, num_wrong=30)
    save_result(run, result)
    told = RUNNER.invoke(app, ["gate", str(run), "--json"])
    assert told.exit_code == 1 and json.loads(told.output)["verdict"] == "HOLD"
    waivers = tmp_path / "w.toml"
    lines = ['check = "accuracy_drop"', 'reason = "r"', 'by = "ada"', "granted = 2020-01-01", "expires = 2999-01-01"]
    waivers.write_text("\n".join(["[[waiver]]", *lines]))
    files = ["--markdown", str(tmp_path / "c.md"), "--junit", str(tmp_path / "j.xml")]
    assert RUNNER.invoke(app, ["gate", str(run), "--waivers", str(waivers), *files]).exit_code == 0
    assert load_result(run).decision.verdict is Verdict.SHIP
    assert "WAIVED by ada" in (tmp_path / "c.md").read_text() and "SHIP" in (tmp_path / "c.md").read_text()
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert suite.get("failures") == "0" and suite.get("skipped") == "1"
    assert "WAIVED by ada" in (run / "report.html").read_text()
    assert RUNNER.invoke(app, ["gate", str(run), "--baseline", str(tmp_path)]).exit_code == 2
