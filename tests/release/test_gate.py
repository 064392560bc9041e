"""The gate's truth table: passed, failed, unknown, for every kind of limit."""

from dataclasses import replace
from typing import Literal

import pytest
from finished_runs import conditions

from deploypipe.records import (
    BenchmarkReport,
    Check,
    Environment,
    Interval,
    Latency,
    Measurement,
    ModelFile,
    Status,
    Verdict,
)
from deploypipe.release.gate import decide
from deploypipe.report.run_tables import check_cells
from deploypipe.target import Budget


def interval(low: float, value: float, high: float) -> Interval:
    return Interval(value=value, low=low, high=high)


def measurement(*, size_mib: float, memory: float, params: int, macs: int, p50: Interval) -> Measurement:
    return Measurement(
        file=ModelFile(
            path="m.onnx",
            sha256=str(macs),
            size_bytes=int(size_mib * 2**20),
            precision="fp32",
            opset=20,
            max_abs_error=0.0,
            input_names=("x",),
            output_names=("output",),
        ),
        num_params=params,
        num_macs=macs,
        latency=Latency(batch_size=1, num_threads=1, samples_ms=(), p50_ms=p50, p90_ms=None, p99_ms=None),
        peak_memory_mib=memory,
        per_sample_metric=(),
        accuracy=None,
    )


REPORT = BenchmarkReport(
    dense=measurement(size_mib=8, memory=40, params=2_000_000, macs=100_000_000, p50=interval(9.9, 10, 10.1)),
    compressed=measurement(size_mib=4, memory=30, params=1_000_000, macs=50_000_000, p50=interval(4.7, 4.8, 4.9)),
    latency_ratio=interval(0.47, 0.48, 0.5),
    accuracy_drop_pp=interval(-0.1, 0.4, 0.9),
    environment=Environment(
        cpu="",
        cpu_features=(),
        num_cpus=1,
        governor="",
        load_before=0,
        memory_gib=1,
        gpu="",
        system="",
        versions={},
        device_fingerprint="",
    ),
    is_steady=True,
)
UNTIMED = replace(
    REPORT,
    dense=replace(REPORT.dense, latency=None, peak_memory_mib=None),
    compressed=replace(REPORT.compressed, latency=None, peak_memory_mib=None),
    latency_ratio=None,
    accuracy_drop_pp=None,
    is_steady=False,
    notes=("the runtime is absent",),
)


@pytest.mark.parametrize(
    ("budget", "name", "passes"),
    [
        (Budget(latency_p50="0.5x"), "latency_p50", True),  # a tie with the upper end
        (Budget(latency_p50="0.49x"), "latency_p50", False),  # the value would pass, the upper end does not
        (Budget(latency_p50="4.9 ms"), "latency_p50", True),
        (Budget(latency_p50="4850 us"), "latency_p50", False),
        (Budget(peak_memory="0.75x"), "peak_memory", True),
        (Budget(peak_memory="29 MiB"), "peak_memory", False),
        (Budget(file_size="4 MiB"), "file_size", True),
        (Budget(file_size="0.4x"), "file_size", False),
        (Budget(params="1 M"), "params", True),
        (Budget(params="999 k"), "params", False),
        (Budget(macs="0.5x"), "macs", True),
        (Budget(macs="49 M"), "macs", False),
        (Budget(accuracy_drop_pp=0.9), "accuracy_drop", True),
        (Budget(accuracy_drop_pp=0.5), "accuracy_drop", False),  # the value would pass
    ],
)
def test_every_limit(budget: Budget, name: str, passes: bool) -> None:
    decision = decide(REPORT, budget)
    check = next(c for c in decision.checks if c.name == name)
    assert check.status is (Status.PASS if passes else Status.FAIL)
    assert decision.verdict is (Verdict.SHIP if passes else Verdict.HOLD)
    assert check.limit is not None
    assert check.measured is not None
    if not passes:
        assert decision.reason.startswith(f"{name} failed (")
        assert decision.reason.count("failed") == 1


def test_relative_latency_is_stated_as_the_measured_ratio() -> None:
    """In the unit of its limit, as tables state it: the ratio times a median would be another figure than either."""
    check = decide(REPORT, Budget(latency_p50="0.5x")).checks[0]
    assert check_cells(check)[2:4] == ("0.480x (0.470 to 0.500)", "0.5x")
    assert check.reason == "the upper end of its interval, 0.500x, is within the limit of 0.5x"


def test_a_figure_that_rounds_to_its_limit_is_just_above_it() -> None:
    close = replace(REPORT, accuracy_drop_pp=interval(0.1, 0.2, 0.5004))
    reason = decide(close, Budget(accuracy_drop_pp=0.5)).checks[0].reason
    assert reason == "the upper end of its interval, 0.50 pp, is just above the limit of 0.5 pp"


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(latency_p50="0.5x"), "latency_p50"),
        (Budget(latency_p50="100 ms"), "latency_p50"),
        (Budget(peak_memory="0.5x"), "peak_memory"),
        (Budget(peak_memory="9 GiB"), "peak_memory"),
        (Budget(), "accuracy_drop"),
    ],
)
def test_unmeasured_never_passes(budget: Budget, name: str) -> None:
    decision = decide(UNTIMED, budget)
    check = next(c for c in decision.checks if c.name == name)
    assert check.status is Status.UNKNOWN
    assert check.measured is None
    assert decision.verdict is Verdict.HOLD
    assert name in decision.reason and decision.reason.count("it was not measured; the runtime is absent") == 1


def test_unsteady_timings_hold_the_latency_alone() -> None:
    shaky = replace(REPORT, is_steady=False, notes=("dense: the median drifted by +30%",))
    decision = decide(shaky, Budget(latency_p50="0.9x", params="0.9x"))
    assert [c.status for c in decision.checks] == [Status.UNKNOWN, Status.PASS, Status.PASS]
    assert decision.reason == (
        "latency_p50 is unknown (the timings were not steady: dense: the median drifted by +30%)"
    )
    assert decide(shaky, Budget(params="0.9x")).verdict is Verdict.SHIP


@pytest.mark.parametrize("latency", ["0.9x", "0.1x", "9 ms", "1 ms"])
@pytest.mark.parametrize(
    ("verdict", "why"), [("throttled", "heat slowed the processor down 2 times"), ("noisy", "others kept 1.9 of 2")]
)
def test_a_throttled_or_noisy_machine_decides_no_latency(
    verdict: Literal["throttled", "noisy"], why: str, latency: str
) -> None:
    """The figure is shown with the reason, and nothing is concluded: not that it passed, and not that it failed."""
    shaky = replace(REPORT, conditions=conditions(verdict, why))
    decision = decide(shaky, Budget(latency_p50=latency, params="0.9x"))
    steady = decide(replace(REPORT, conditions=conditions("steady")), Budget(latency_p50=latency)).checks[0]
    check = decision.checks[0]
    assert check.status is Status.UNKNOWN and decision.verdict is Verdict.HOLD
    assert (check.measured, check.interval, check.limit) == (steady.measured, steady.interval, steady.limit)
    assert f"the machine was {verdict}: {why}" in check.reason and check.reason in decision.reason
    assert steady.status is not Status.UNKNOWN and decision.checks[1].status is Status.PASS
    shown = check_cells(check)[2]
    assert shown == ("0.480x (0.470 to 0.500)" if latency.endswith("x") else "4.800 ms (4.700 to 4.900)")
    assert "not measured" not in decision.reason


def test_an_absolute_latency_says_what_its_interval_covers() -> None:
    timed = replace(REPORT, conditions=conditions("steady"))
    absolute, relative = (decide(timed, Budget(latency_p50=limit)).checks[0].reason for limit in ("5 ms", "0.9x"))
    assert "under drifts as slow as the measurement, 6 s, not those from day to day" in absolute
    assert "day to day" not in relative  # both files meet a drift


def test_nan_is_unknown_and_all_blocking_checks_are_named() -> None:
    broken = replace(REPORT, accuracy_drop_pp=interval(0, float("nan"), float("nan")))
    decision = decide(broken, Budget(params="1 k", file_size="1 KiB"))
    assert [c.status for c in decision.checks] == [Status.FAIL, Status.FAIL, Status.UNKNOWN]
    assert all(c.name in decision.reason for c in decision.checks)


def test_a_file_that_parts_from_the_network_is_held() -> None:
    def parity(error: float) -> Check:
        file = replace(REPORT.compressed.file, max_abs_error=error)
        report = replace(REPORT, compressed=replace(REPORT.compressed, file=file))
        decision = decide(report, Budget(), parity_limit=1e-3)
        return next(check for check in decision.checks if check.name == "parity")

    assert parity(1e-3).status is Status.PASS
    assert parity(2e-3).status is Status.FAIL and "0.002 relative is above" in parity(2e-3).reason
    assert parity(float("nan")).status is Status.UNKNOWN
