"""The doctor tells what is there, what is missing and what to do."""

import pytest

from deploypipe import doctor
from deploypipe.doctor import Finding, examine
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
    findings = by_name(examine(Target(runtime="tensorrt", name="orin", num_threads=10_000)))
    assert findings["target orin"].status == "missing"
    assert "can export" in findings["target orin"].detail
    assert "set runtime = 'onnxruntime'" in findings["target orin"].remedy
    assert findings["target threads"].status == "limited"
    here = by_name(examine(Target(runtime="onnxruntime", name="here")))
    assert (here["target here"].status, here["target threads"].status) == ("ok", "ok")
