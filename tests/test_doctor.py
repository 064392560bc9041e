"""The doctor tells what is there, what is missing and what to do."""

import pytest

from deploypipe import doctor
from deploypipe.doctor import Finding, examine
from deploypipe.runtimes.ability_for_target import Ability
from deploypipe.target import Target


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    findings = by_name(examine(None))
    assert "onnxruntime" in findings["runtimes"].detail
    assert "torch 2." in findings["packages"].detail
    assert not any(name.startswith("target") for name in findings)
    assert all(bool(f.remedy) == (f.status != "ok") and f.detail for f in findings.values())
    assert capsys.readouterr() == ("", "")


def test_missing_extras_name_their_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda *modules: modules[0] != "jinja2")
    findings = by_name(examine(None))
    report = findings["extra report"]
    assert (report.status, report.remedy) == ("missing", "pip install 'deploypipe[report]'")
    assert "jinja2 not installed" in report.detail
    assert findings["extra demo"].status == "ok"


def test_a_target_this_machine_can_only_export_for() -> None:
    orin = Target(runtime="tensorrt", name="orin", board="Orin Nano", num_threads=4_096)
    findings = by_name(examine(orin))
    assert findings["target orin"].status == "missing"
    assert "can make an ONNX file for it, but cannot run" in findings["target orin"].detail
    assert findings["target orin"].remedy == "on the device itself: deploypipe doctor orin"
    assert findings["target threads"].status == "limited"
    here = by_name(examine(Target(runtime="onnxruntime", name="here")))
    assert (here["target here"].status, here["target threads"].status) == ("ok", "ok")


def test_a_target_that_lacks_a_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = Ability(verdict="export only", reason="X is not there; pip install onnxruntime-x")
    monkeypatch.setattr(doctor, "can", lambda _: lacking)
    finding = by_name(examine(Target(runtime="onnxruntime", name="here")))["target here"]
    assert (finding.status, finding.remedy) == ("missing", "pip install onnxruntime-x")


def test_providers_of_onnxruntime() -> None:
    assert "cpu" in by_name(examine(None))["providers"].detail


def test_what_is_shown_of_a_finding_fits_80_columns() -> None:
    """The names, statuses and findings of a table without borders, on a machine with a name of usual length."""
    findings = [f for f in examine(Target(runtime="tensorrt", name="jetson_orin_nano")) if f.name != "providers"]
    for finding in findings:
        assert len(finding.brief) <= (80 if finding.name == "processor" else 48), finding


def test_a_runtime_that_is_an_extra_is_ok_only_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda *modules: modules[0] == "tensorrt")
    findings = by_name(examine(None))
    assert findings["runtimes"].brief == "eager, onnxruntime, tensorrt"
    assert findings["runtimes"].detail.endswith("; not installed: tensorrt-rtx")
    assert (findings["extra tensorrt"].status, findings["extra tensorrt-rtx"].status) == ("ok", "missing")
