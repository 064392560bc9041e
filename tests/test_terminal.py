"""What is printed at the end of a run: every reason once."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from finished_runs import finished_run, interval, untouched_run

from deploypipe.cli.terminal import show_checks, show_result
from deploypipe.records import AccuracyHere
from deploypipe.release.gate import decide
from deploypipe.runs.result import RunResult
from deploypipe.target import Budget

COMMAND = "deploypipe run digits x86_cpu"


def held(run: RunResult, budget: Budget) -> RunResult:
    decision = decide(run.benchmark, budget)
    return replace(run, decision=decision, target=replace(run.target, budget=budget), command=COMMAND)


def printed(run: RunResult, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    show_result(run, tmp_path)
    return capsys.readouterr().out


def test_a_target_that_is_elsewhere_has_its_reason_once_and_the_accuracy_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    why = "nothing was measured: target 'orin': this machine is x86_64, not aarch64"
    here = AccuracyHere(
        dense=interval(0.98, 0.01), compressed=interval(0.97, 0.01), drop_pp=interval(1.0, 0.5), num_samples=500
    )
    run = untouched_run()
    run = replace(run, benchmark=replace(run.benchmark, notes=(why,), accuracy_here=here))
    run = held(run, Budget(latency_p50="0.5x", peak_memory="0.5x", accuracy_drop_pp=1.0))
    said = printed(run, capsys, tmp_path)
    assert said.count("x86_64, not aarch64") == 1
    assert said.count("as above") == 2 and "HOLD: latency p50, peak memory, accuracy drop unknown" in said
    (row,) = [line for line in said.splitlines() if line.startswith(run.metric)]
    assert "98.00 % (n = 500)" in row and "97.00 % (n = 500)" in row
    assert "-1.00 pp (-1.50 to -0.50) on this machine, not on the device" in row
    assert said.count(COMMAND) == 1 and "UNKNOWN" in said
    assert run.decision.reason.count(why) == 1  # where there is no table


def test_an_unsteady_machine_and_a_failed_check_have_their_reasons_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    doubt = "dense: the median drifted by +30%"
    run = finished_run()
    run = replace(run, benchmark=replace(run.benchmark, is_steady=False, notes=(doubt,), conditions=None))
    run = held(run, Budget(latency_p50="0.1x", macs="0.01x", accuracy_drop_pp=20.0))
    said = printed(run, capsys, tmp_path)
    assert said.count(doubt) == 1 and said.count("is above the limit of") == 1
    assert "HOLD: macs failed; latency p50 unknown" in said


def test_in_a_narrow_terminal_reasons_follow_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    why = "nothing was measured: this machine is x86_64, and the target is a device with another processor"
    run = untouched_run()
    run = replace(run, benchmark=replace(run.benchmark, notes=(why,)))
    checks = held(run, Budget(latency_p50="0.5x", params="1x", accuracy_drop_pp=1.0)).decision.checks
    for columns, is_narrow in (("80", True), ("200", False)):
        monkeypatch.setenv("COLUMNS", columns)
        show_checks(checks, "Gate")
        said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(len(line.rstrip()) for line in said.splitlines()) <= max(int(columns), 100)
        text = " ".join(said.split())
        assert (f"latency p50, accuracy drop: it was not measured; {why}" in text) == is_narrow
        assert ("within the limit" in text) != is_narrow  # why a check passed
